"""The index follows the documents: what they hold and it does not is brought in, owner by owner."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from xpert.errors import Corrupt, NotFound
from xpert.registry.documents import DocumentName
from xpert.registry.index import Index
from xpert.registry.record_folder import RecordFolder

__all__ = ["changed_owners", "follow"]

_SETTLED_SECONDS = 2.0
"""A folder changed this lately may change again without its time of change telling: it is looked at once more."""


def changed_owners(index: Index, records: RecordFolder) -> list[str]:
    """The owners among whose documents something came, went or moved since the index looked at them.

    Cost: one look at each owner's folder; names are read only where its time of change differs.
    """
    known = index.owners()
    found = {owner: at for owner, at in records.owners().items() if known.get(owner) != at}
    return [owner for owner, at in found.items() if _is_settled(at) or _differs(index, records, owner)]


def follow(
    index: Index, records: RecordFolder, owner: str | None = None, *, keep_copy: Callable[[DocumentName], None]
) -> None:
    """Brings into the index what the documents of one owner, or of all, hold and it does not.

    Inside the writing transaction. Whose writer died may lack its copy: `keep_copy` sees to it first. Damaged documents
    are left to `verify`.
    """
    owners = records.owners()
    for one in [owner] if owner is not None else sorted(owners):
        seen = owners.get(one)
        known = index.listing(one)
        for key, removed in records.listing(one).items():
            if known.get(key) == removed:
                continue
            with contextlib.suppress(Corrupt, NotFound):
                if removed:
                    keep_copy(DocumentName(key[0], "removed", key[1]))
                    index.mark_removed(*key)
                elif key not in known:
                    record = records.read(*key)
                    keep_copy(record.document)
                    index.add(record.version)
        for document, mark in _moved_tags(index, records, one):
            with contextlib.suppress(Corrupt, NotFound):
                tag = records.read_tag(document)
                keep_copy(document)
                index.set_tag(tag, mark)
        if seen is not None and _is_settled(seen):
            index.looked_at(one, seen)


def _differs(index: Index, records: RecordFolder, owner: str) -> bool:
    if records.listing(owner) != index.listing(owner):
        return True
    for document, _ in _moved_tags(index, records, owner):
        with contextlib.suppress(Corrupt, NotFound):
            tag = records.read_tag(document)
            if tag != index.tag(tag.name, tag.tag):
                return True
    return False


def _moved_tags(index: Index, records: RecordFolder, owner: str) -> Iterator[tuple[DocumentName, str]]:
    """The tags of an owner whose documents are not those that the index has read, with their marks."""
    known = index.tag_marks(owner)
    for document in records.documents(owner):
        if document.kind == "tag" and document.tag is not None:
            mark = records.mark(document)
            if known.get((document.name, document.tag)) != mark:
                yield document, mark


def _is_settled(changed: int) -> bool:
    return time.time_ns() - changed > _SETTLED_SECONDS * 1e9
