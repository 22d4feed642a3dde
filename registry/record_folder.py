"""The documents of one registry: under their names in `records/`, and once more as blobs, from which names can be made.

A document counts from the moment it has its name. Both the named one and its copy are fsynced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable
from xpert.registry.blobs import BlobStore, Drafts, open_plain, sync_folder
from xpert.registry.documents import (
    MOST_BYTES,
    DocumentName,
    Tag,
    document_bytes,
    parse_document,
    read_checked,
    removal,
)
from xpert.registry.signing.signatures import SignatureList
from xpert.registry.versions import Record

__all__ = ["RecordFolder", "read_plain"]


class RecordFolder:
    """The truth of what is published. `copies` holds every document's content by its sha256."""

    def __init__(self, folder: Path, drafts: Drafts, copies: BlobStore) -> None:
        self.folder = folder
        self.copies = copies
        self._drafts = drafts

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────

    def path(self, document: DocumentName) -> Path:
        return self.folder / str(document)

    def record_path(self, name: str, version: int) -> Path:
        return self.path(DocumentName(name, "record", version))

    def owners(self) -> dict[str, int]:
        """Owner -> time of the last change among its documents' names, in ns."""
        return {
            entry.name: entry.stat(follow_symlinks=False).st_mtime_ns
            for entry in _entries(self.folder)
            if entry.is_dir(follow_symlinks=False)
        }

    def documents(self, owner: str | None = None) -> Iterator[DocumentName]:
        """The names of all documents, or of one owner's. Reads names, not contents; what is none is passed over."""
        for folder in [owner] if owner is not None else sorted(self.owners()):
            for entry in _entries(self.folder / folder):
                try:
                    yield parse_document(f"{folder}/{entry.name}")
                except BadInput:
                    continue

    def listing(self, owner: str | None = None) -> dict[tuple[str, int], bool]:
        """(name, version) -> whether it was removed, of all owners or of one."""
        found: dict[tuple[str, int], bool] = {}
        for document in self.documents(owner):
            if document.version is not None and document.kind != "signatures":
                key = document.name, document.version
                found[key] = document.kind == "removed" or found.get(key, False)
        return found

    def numbers(self, name: str) -> dict[int, bool]:
        """version -> whether it was removed, of one name."""
        listed = self.listing(name.partition("/")[0])
        return {version: removed for (found, version), removed in listed.items() if found == name}

    def strangers(self) -> list[Path]:
        """What lies among the records and is none."""
        found = []
        for owner in _entries(self.folder):
            if not owner.is_dir(follow_symlinks=False):
                found.append(Path(owner.path))
                continue
            for entry in _entries(Path(owner.path)):
                try:
                    parse_document(f"{owner.name}/{entry.name}")
                    strange = not entry.is_file(follow_symlinks=False)
                except BadInput:
                    strange = True
                if strange:
                    found.append(Path(entry.path))
        return sorted(found)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read_bytes(self, document: DocumentName) -> bytes:
        """A document's content, its size bounded; raises NotFound where there is none, Corrupt for no plain file."""
        return read_plain(self.path(document))

    def read(self, name: str, version: int) -> Record:
        """Raises NotFound where there is no such record, Corrupt where it is damaged."""
        document = DocumentName(name, "record", version)
        where = str(self.path(document))
        record = Record.from_bytes(self.read_bytes(document), where=where)
        if record.document != document:
            raise Corrupt(f"holds the record of {record.version.ref}", where=where)
        return record

    def read_tag(self, document: DocumentName) -> Tag:
        where = str(self.path(document))
        tag = Tag.from_dict(read_checked(self.read_bytes(document), where=where), where=where)
        if tag.document != document:
            raise Corrupt(f"holds the tag {tag.tag} of {tag.name}", where=where)
        return tag

    def read_signatures(self, name: str, version: int) -> SignatureList:
        """The signatures of a version; an empty list where there are none, Corrupt where it is damaged."""
        document = DocumentName(name, "signatures", version)
        where = str(self.path(document))
        try:
            data = self.read_bytes(document)
        except NotFound:
            return SignatureList(name, version)
        found = SignatureList.from_dict(read_checked(data, where=where), where=where)
        if (found.name, found.version) != (name, version):
            raise Corrupt(f"holds the signatures of {found.ref}", where=where)
        return found

    def mark(self, document: DocumentName) -> str:
        """Changes when another document takes this name; empty where there is none. Cost: one look, no reading."""
        try:
            found = self.path(document).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    def removed(self, name: str, version: int) -> bool:
        return self.path(DocumentName(name, "removed", version)).is_file()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, record: Record) -> None:
        """Writes a new record, whole; raises FileExistsError where that version has one."""
        self.create(record.document, record.to_bytes())

    def create(self, document: DocumentName, data: bytes) -> None:
        """Gives a new document its name; raises FileExistsError where it is taken."""
        self._write(self.path(document), data, replace=False)
        self.copies.put_bytes(data)

    def replace(self, document: DocumentName, data: bytes) -> None:
        """Writes a document, in place of the one that bears its name if there is one.

        Its copy is there first: who dies between the two leaves litter, and not a document without a copy. (A record
        and a mark of removal come the other way round, lest a copy speak of what never was; the index follows them.)
        """
        self.copies.put_bytes(data)
        self._write(self.path(document), data, replace=True)

    def remove(self, name: str, version: int) -> None:
        """Marks a version as removed; from the mark on, it is."""
        mark = DocumentName(name, "removed", version)
        data = document_bytes(removal(name, version))
        self._write(self.path(mark), data, replace=True)
        self.copies.put_bytes(data)
        for kind in ("record", "signatures"):
            self.path(DocumentName(name, kind, version)).unlink(missing_ok=True)
        sync_folder(self.path(mark).parent)

    def keep_copy(self, document: DocumentName) -> None:
        """Sees to it that a document has its copy; one whose writer died may lack it."""
        self.copies.put_bytes(self.read_bytes(document))

    def _write(self, target: Path, data: bytes, *, replace: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._drafts.new() as (draft, stream):
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
            if replace:
                draft.replace(target)
            else:
                _link(draft, target)
        sync_folder(target.parent)


def read_plain(path: Path) -> bytes:
    """A document's file, or a copy's; see `RecordFolder.read_bytes`. Follows no link and waits for no pipe."""
    try:
        with open_plain(path) as stream:
            data = stream.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("no such document", where=str(path)) from None
    except BadInput as error:
        raise Corrupt(error.what, where=str(path), hint=error.hint) from None
    if len(data) > MOST_BYTES:
        raise Corrupt(f"more than {MOST_BYTES:,} bytes, which no document has", where=str(path))
    return data


def _link(draft: Path, target: Path) -> None:
    # A hard link appears whole and never replaces a file, which neither a rename nor O_EXCL gives alone.
    try:
        os.link(draft, target)
    except (PermissionError, NotImplementedError) as error:  # what file systems without hard links say (EPERM)
        raise Unavailable(
            f"the record could not be linked ({error})",
            where=str(target),
            hint="a registry needs a file system with hard links",
        ) from None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
