"""One repository of the Hub as the place of one expert's or mixture's versions.

Every change is one commit upon the commit that was looked at, which the Hub refuses where somebody else was faster;
then it is looked at again. So a number is given once, and no half of a version is ever seen. Git tags follow after the
commit; one that is missing is made by the next change, and until then the version is found by its commit's first line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable
from xpert.registry.documents import MOST_BYTES, DocumentName, Tag, parse_document, read_checked
from xpert.registry.remotes._hub_client import WAITS, HubClient, Moved
from xpert.registry.remotes._hub_layout import CARD, Head, document_path, faults, git_oid, git_tag, plain_card, title_of
from xpert.registry.remotes._transfer import Told
from xpert.registry.versions import Record

__all__ = ["WORKERS", "Found", "HubRepository"]

WORKERS = 8
_MOST_TRIES = 20  # so often may others be faster


@dataclass(frozen=True)
class Found:
    """The commit of a version, what is wrong with its files by the listing, and where the version's git tag points."""

    head: Head
    wrong: Mapping[str, str]
    tagged: str | None


class HubRepository:
    """A model repository, which need not exist yet."""

    def __init__(self, client: HubClient, name: str) -> None:
        self.client = client
        self.name = name

    # ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def publish(
        self, record: Record, data: bytes, files: Mapping[str, Path], told: Told, *, private: bool | None
    ) -> None:
        """A version's files and document in one commit, then its git tag. Raises FileExistsError for a taken number.

        `files` are where the record's files lie here, by their paths in the version.
        """
        document = record.document

        def plan(head: Head) -> list[Any] | None:
            head.check_is_for(document.name)
            present = head.documents.get(str(document))
            if present == git_oid(data):
                return None  # our own commit, whose answer was lost
            if present is not None or str(_removal(document)) in head.documents:
                raise FileExistsError(str(document))
            return self._version(head, record, data, files)

        head, made = self._change(plan, title_of(record.version.ref), told=told, private=private, create=True)
        published = {}
        if made:
            self._check(head, record, files)
            published[f"v{document.version}"] = head.commit
        if head.numbers()[-1] != document.version:
            title = f"Show {document.name}@{head.numbers()[-1]} again"
            head, _ = self._change(lambda head: self._newest_on_top(head, record), title)
        self._align_tags(head, published)

    def find(self, record: Record) -> Found:
        """The commit that holds a version; raises NotFound where there is none.

        That is where its git tag points; or, where that is something else, the commit that published it.
        """
        version = record.version
        tagged = self.client.tags(self.name).get(f"v{version.version}")
        found = None if tagged is None else self._found(record, tagged, tagged)
        if found is None or found.wrong:
            titled = self.client.titled(self.name, title_of(version.ref))
            other = None if titled is None else self._found(record, titled, tagged)
            if other is not None and (found is None or not other.wrong):
                return other
        if found is None:
            raise NotFound("the repository has no commit of this version", where=f"{self.name}: {version.ref}")
        return found

    def _found(self, record: Record, commit: str, tagged: str | None) -> Found:
        head = self.client.tree(self.name, commit)
        return Found(head, faults(record.files, head.files), tagged)

    def _version(self, head: Head, record: Record, data: bytes, files: Mapping[str, Path]) -> list[Any]:
        """What turns `head` into a commit that shows the version: its files, its document, nothing left over."""
        from huggingface_hub import CommitOperationAdd

        top = self._record_on_top(head)
        # New objects for every attempt: they remember what the Hub held when they were looked at.
        operations = self._deletions(head, top, set(files))
        operations += [CommitOperationAdd(path, str(source)) for path, source in files.items()]
        if CARD not in files:
            operations.append(CommitOperationAdd(CARD, plain_card(record)))
        return [*operations, CommitOperationAdd(document_path(str(record.document)), data)]

    def _deletions(self, head: Head, top: Record | None, kept: set[str]) -> list[Any]:
        from huggingface_hub import CommitOperationDelete

        gone = {file.path for file in top.files} - kept - {CARD} if top is not None else set()
        return [CommitOperationDelete(path, is_folder=False) for path in sorted(gone & set(head.files))]

    def _record_on_top(self, head: Head) -> Record | None:
        """The record of the newest version, whose files `main` shows; None where there is none."""
        numbers = head.numbers()
        if not numbers:
            return None
        (name,) = head.names
        return self._record(head, DocumentName(name, "record", numbers[-1]))

    def _record(self, head: Head, document: DocumentName) -> Record | None:
        """A version's record; None for a damaged one, which must not hinder changes. `verify` tells of it."""
        data = self.client.small(self.name, head.commit, document_path(str(document)), MOST_BYTES)
        try:
            return Record.from_bytes(data, where=f"{self.name}: {document}")
        except BadInput:
            return None

    def _check(self, head: Head, record: Record, files: Mapping[str, Path]) -> None:
        """Compares what the Hub says it holds with what was sent."""
        tree = head.files
        wrong = faults(record.files, tree)
        for path, source in files.items():
            if path not in wrong and tree[path].sha256 is None and tree[path].oid != git_oid(source.read_bytes()):
                wrong[path] = "another content than sent"
        if wrong:
            path, what = min(wrong.items())
            raise Corrupt(
                f"the Hub took in something else than was sent: {path} {what}",
                where=f"{self.name}: {record.version.ref}",
                hint="remove that version and publish it again",
            )

    # ── other documents ──────────────────────────────────────────────────────────────────────────────────────────

    def put(self, document: DocumentName, data: bytes, mark: str | None, *, private: bool | None) -> None:
        """Creates or replaces a document that is no record; raises FileExistsError where it is not as `mark` says."""

        def plan(head: Head) -> list[Any] | None:
            from huggingface_hub import CommitOperationAdd

            head.check_is_for(document.name)
            present = head.documents.get(str(document))
            if present == git_oid(data):
                return None  # our own commit, whose answer was lost
            if present != mark:
                raise FileExistsError(str(document))
            operations: list[Any] = [CommitOperationAdd(document_path(str(document)), data)]
            if document.kind == "removed":
                operations += self._without(head, document)
            return operations

        head, _ = self._change(plan, _verb(document), private=private, create=mark is None)
        self._align_tags(head, {}, _tag(document, data))

    def _without(self, head: Head, removal: DocumentName) -> list[Any]:
        """The operations that end a version: its documents go, and `main` shows the newest of those that stay."""
        from huggingface_hub import CommitOperationDelete

        ended = DocumentName(removal.name, "record", removal.version)
        others = [ended, DocumentName(removal.name, "signatures", removal.version)]
        operations: list[Any] = [
            CommitOperationDelete(document_path(str(other)), is_folder=False)
            for other in others
            if str(other) in head.documents
        ]
        numbers = head.numbers()
        if removal.version not in numbers or removal.version != numbers[-1]:
            return operations
        gone = self._record(head, ended)
        if len(numbers) == 1:
            operations += self._deletions(head, gone, set())
            return operations + [CommitOperationDelete(CARD, is_folder=False)] * (CARD in head.files)
        below = self._record(head, DocumentName(removal.name, "record", numbers[-2]))
        return operations + ([] if below is None else self._shown(head, below, gone))

    def _newest_on_top(self, head: Head, over: Record) -> list[Any] | None:
        """What brings the newest version's files back to the top after those of an older number were put there."""
        top = self._record_on_top(head)
        return None if top is None else self._shown(head, top, over) or None

    def _shown(self, head: Head, record: Record, gone: Record | None) -> list[Any]:
        """The operations that make `main` show an earlier version's files again; large ones are copied there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy

        found = self.find(record)
        there = found.head.files
        paths = {file.path for file in record.files} & set(there)
        operations = self._deletions(head, gone, paths)
        for path in sorted(paths):
            if head.files.get(path) != there[path]:
                operations.append(CommitOperationCopy(path, path, src_revision=found.head.commit))
        if CARD not in paths:
            operations.append(CommitOperationAdd(CARD, plain_card(record)))
        return operations

    # ── commits and tags ─────────────────────────────────────────────────────────────────────────────────────────

    def _change(
        self,
        plan: Callable[[Head], list[Any] | None],
        title: str,
        *,
        told: Told | None = None,
        private: bool | None = None,
        create: bool = False,
    ) -> tuple[Head, bool]:
        """Commits what `plan` makes of the newest commit, and again as often as somebody else is faster.

        The commit made, and True; or the newest one and False, where `plan` gives None since there is nothing to do: so
        also where the answer to a commit was lost, since it is looked whether it was done.
        """
        waits = list(WAITS)
        for _ in range(_MOST_TRIES):
            head = self._look(create=create, private=private)
            operations = plan(head)
            if operations is None:
                return head, False
            try:
                self._upload(operations, told)
                told = None
                commit = self.client.commit(self.name, operations, title, head.commit)
                return self.client.tree(self.name, commit), True
            except Moved:
                time.sleep(WAITS[0] / 10)
            except Unavailable:
                if not waits:
                    raise
                time.sleep(waits.pop(0))
        raise Unavailable("others change the repository all the time", where=self.name, hint="try again later")

    def _look(self, *, create: bool, private: bool | None) -> Head:
        try:
            return self.client.head(self.name)
        except NotFound:
            if not create:
                raise
        self.client.create(self.name, private=private)
        return self.client.head(self.name)

    def _upload(self, operations: Sequence[Any], told: Told | None) -> None:
        additions = [operation for operation in operations if hasattr(operation, "upload_info")]
        self.client.upload(self.name, additions, told or (lambda count: None), WORKERS)

    def _align_tags(self, head: Head, published: Mapping[str, str], moved: Tag | None = None) -> None:
        """Git tags for all versions that have none, none for removed ones, and the one that was moved.

        `published` are the commits of versions that are known already, by their git tags.
        """
        tags = self.client.tags(self.name)
        parsed = [parse_document(document) for document in head.documents]
        for document in parsed:
            tag = f"v{document.version}"
            if document.kind == "removed" and tag in tags:
                self.client.untag(self.name, tag)
            elif document.kind == "record" and tag not in tags:
                commit = published.get(tag) or self.client.titled(
                    self.name, title_of(f"{document.name}@{document.version}")
                )
                if commit is not None:
                    self.client.tag(self.name, tag, commit)
                    tags[tag] = commit
        name = None if moved is None else git_tag(moved.document)
        if moved is None or name is None:
            return
        target = tags.get(f"v{moved.version}")
        if name in tags and tags[name] != target:
            self.client.untag(self.name, name)
        if target is not None and tags.get(name) != target:
            self.client.tag(self.name, name, target)


def _removal(document: DocumentName) -> DocumentName:
    return DocumentName(document.name, "removed", document.version)


def _tag(document: DocumentName, data: bytes) -> Tag | None:
    """Where a document moves a tag to; None for other documents, and for damaged ones, of which their readers tell."""
    try:
        return Tag.from_dict(read_checked(data, where=str(document)), where=str(document)) if document.tag else None
    except BadInput:
        return None


def _verb(document: DocumentName) -> str:
    """The first line of a document's commit."""
    if document.kind == "tag":
        return f"Move the tag {document.name}@{document.tag}"
    return f"{'Remove' if document.kind == 'removed' else 'Sign'} {document.name}@{document.version}"
