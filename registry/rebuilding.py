"""Making the names of documents again from their copies among the blobs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xpert.errors import NotFound, XpertError
from xpert.progress import Progress
from xpert.registry.documents import DocumentName, Tag, parse_document, read_checked
from xpert.registry.record_folder import RecordFolder, read_plain
from xpert.registry.signing.signatures import SignatureList
from xpert.registry.versions import KINDS, Record

__all__ = ["Rebuilt", "check_document", "document_of", "lost_documents", "restore_names"]


@dataclass(frozen=True)
class Rebuilt:
    """What `rebuild` found: versions in force, marks of removed ones, documents that got their name or their content
    back, and what could not be used."""

    versions: int
    removed: int
    restored: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Copy:
    document: DocumentName
    data: bytes
    value: Mapping[str, Any]

    def outdoes(self, other: _Copy, records: RecordFolder) -> bool:
        """Of two contents of one name the later revision counts; of two records the one that has the name, or else the
        one that was made first."""
        if self.document.kind != "record":
            return bool(self.value.get("revision", 0) > other.value.get("revision", 0))
        if records.path(self.document).is_file():
            return records.read_bytes(self.document) == self.data
        return str(self.value.get("created")) < str(other.value.get("created"))


def restore_names(records: RecordFolder, progress: Progress) -> Rebuilt:
    """Gives every document that is in force its name, with sound content; see `Registry.rebuild`."""
    problems: list[str] = []
    copies = _copies(records, problems, progress)
    removed = {(d.name, d.version) for d in (*copies, *records.documents()) if d.kind == "removed"}
    restored = []
    for document, copy in sorted(copies.items(), key=lambda item: str(item[0])):
        if document.kind in ("record", "signatures") and (document.name, document.version) in removed:
            records.path(document).unlink(missing_ok=True)
        elif _must_replace(records, copy):
            records.replace(document, copy.data)
            restored.append(str(document))
    versions = 0
    for document in records.documents():
        try:
            check_document(document, read_checked(records.read_bytes(document), where=str(document)))
        except XpertError as error:
            problems.append(f"{document}: {error.what}")
            continue
        records.keep_copy(document)
        versions += document.kind == "record"
    return Rebuilt(versions, len(removed), tuple(restored), tuple(problems))


def lost_documents(records: RecordFolder) -> list[tuple[str, int]]:
    """(name, version) of the records that have a copy, but neither their name nor a mark of removal."""
    listed = records.listing()
    copies: dict[DocumentName, _Copy] = _copies(records, [])
    gone = {(d.name, d.version) for d in copies if d.kind == "removed"}
    return sorted(
        (d.name, d.version)
        for d in copies
        if d.kind == "record"
        and d.version is not None
        and (d.name, d.version) not in listed
        and (d.name, d.version) not in gone
    )


def _copies(records: RecordFolder, problems: list[str], progress: Progress | None = None) -> dict[DocumentName, _Copy]:
    """The document of each name, out of the copies; of several the one that counts."""
    found: dict[DocumentName, _Copy] = {}
    for copy in _read_copies(records, problems):
        other = found.get(copy.document)
        if other is None or copy.outdoes(other, records):
            found[copy.document] = copy
    if progress is not None:
        progress.say(f"found {len(found):,} documents among the blobs")
    return found


def _read_copies(records: RecordFolder, problems: list[str]) -> Iterator[_Copy]:
    for sha256, path in records.copies.all():
        where = f"blobs/documents/{sha256[:2]}/{sha256[2:]}"
        try:
            if not sha256:
                raise NotFound("does not belong here")
            data = read_plain(path)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise NotFound("damaged: its content does not match its sha256")
            value = read_checked(data, where=where)
            document = document_of(value)
            check_document(document, value)
        except XpertError as error:
            problems.append(f"{where or path}: {error.what}")
            continue
        yield _Copy(document, data, value)


def document_of(value: Mapping[str, Any]) -> DocumentName:
    kind = value.get("kind")
    if kind == "tag":
        return parse_document(f"{value.get('name')}@{value.get('tag')}.tag.json")
    ending = "" if kind in KINDS else f".{kind}"
    return parse_document(f"{value.get('name')}@{value.get('version')}{ending}.json")


def check_document(document: DocumentName, value: Mapping[str, Any]) -> None:
    """Raises where a content is not what its name says."""
    if document.kind == "removed" and value.get("kind") != "removed":
        return  # schema 1: the old record under another name
    if document_of(value) != document:
        raise NotFound(f"holds {document_of(value)}")
    where = str(document)
    if document.kind == "record":
        Record.from_dict(value, where=where)
    elif document.kind == "tag":
        Tag.from_dict(value, where=where)
    elif document.kind == "signatures":
        SignatureList.from_dict(value, where=where)


def _must_replace(records: RecordFolder, copy: _Copy) -> bool:
    """Whether the document under the copy's name is missing, damaged, or an older revision."""
    try:
        value = read_checked(records.read_bytes(copy.document), where="")
        check_document(copy.document, value)
    except XpertError:
        return True
    return copy.document.kind in ("tag", "signatures") and value["revision"] < copy.value["revision"]
