"""A registry somewhere else: a local registry in the cache, the mirror, and the place behind it.

    registries/HASH/            in the cache folder, one for each place
        registry.json, records/, index.sqlite, blobs/    as in every registry; blobs only as far as they were needed
        marks.json              the place's mark of every document that is here
        partials/               downloads under way

Before it answers, the mirror brings in the documents that changed (`_sync`); many processes share it, and one at a time
syncs. What is written goes to the place first. A version's contents are sent outside the index's writing transaction,
since that may take long; the number is given out by the place, which takes the record under a condition only.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.progress import SILENT, Progress
from xpert.registry.blobs import DOCUMENTS, BlobStore
from xpert.registry.card import CARD_FILE
from xpert.registry.checkout import check_out, check_out_to_cache, is_sound
from xpert.registry.documents import SCHEMA, DocumentName, document_bytes, parse_document, read_checked, removal
from xpert.registry.index import Index
from xpert.registry.intake import MIXTURE_FILE, Intake
from xpert.registry.names import LATEST, Ref
from xpert.registry.rebuilding import Rebuilt, check_document, document_of
from xpert.registry.record_folder import RecordFolder
from xpert.registry.remote import Remote
from xpert.registry.signing.keys import SigningKey
from xpert.registry.signing.signatures import SignatureList
from xpert.registry.soundness import Problem, check_documents, check_index
from xpert.registry.store import INDEX, MARK, Details, Garbage, Registry
from xpert.registry.versions import Record, StoredFile, Version
from xpert.storage import cache_folder, disk_errors, exclusive, read_json, write_file, write_json

__all__ = ["OFFLINE", "RemoteRegistry"]

OFFLINE = "XPERT_OFFLINE"
FRESH_SECONDS = 2.0
"""What was synced this lately is answered from without asking again, unless something is to be written."""

T = TypeVar("T")
_MARKS = "marks.json"
_READERS = 16
_ATTEMPTS = 100
_DAY = 86_400.0


class _Unsent(Exception):
    """A version that has its record and number, and is to be sent; leaves the writing transaction."""

    def __init__(self, record: Record) -> None:
        self.record = record


class _Beaten(Exception):
    """Somebody else wrote a document first."""


class RemoteRegistry(Registry):
    """A registry behind a `Remote`, with the same methods as one in a folder.

    With `XPERT_OFFLINE=1` it answers from the mirror as it is, and writes nothing.
    """

    def __init__(self, remote: Remote) -> None:
        name = hashlib.sha256(remote.location.encode()).hexdigest()[:16]
        super().__init__(cache_folder() / "registries" / name)
        self.remote = remote
        self._damaged: dict[DocumentName, XpertError] = {}
        self.records = _MirrorRecords(self.folder / "records", self.drafts, _NoCopies(self.blobs.folder / DOCUMENTS))
        self.records.elsewhere = self._damaged
        self._synced: float | None = None
        self._syncing = threading.Lock()

    @property
    def location(self) -> str:
        return self.remote.location

    @property
    def notice(self) -> str | None:
        if not _offline():
            return None
        try:
            seen = time.strftime("%Y-%m-%d %H:%M", time.localtime((self.folder / _MARKS).stat().st_mtime))
        except FileNotFoundError:
            return None
        return f"{OFFLINE} is set: {self.location} as it was on {seen}"

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _make(self) -> None:
        """Nothing is there before the first version; the mirror is made."""
        self._online()
        self._synced = None
        try:
            self._sync()
        except NotFound as error:
            if error.where != self.location or "no registry" not in error.what:
                raise
            self._take_in({})

    def _enter(self, intake: Intake, name: str, tags: Sequence[str], *, stay: bool, progress: Progress) -> Version:
        for _ in range(_ATTEMPTS):
            before = self._latest(name) if stay else None
            try:
                with self._opened() as index, index.writing():
                    version = self._file(index, intake, name, stay=False)  # published already
            except _Unsent as unsent:
                try:
                    self._send(unsent.record, progress)
                except FileExistsError:
                    continue  # somebody else took the number
                version = unsent.record.version
                if before is not None:
                    self.tag(before, LATEST)
            for tag in tags:
                self.tag(version.ref, tag)
            return version
        raise Unavailable(f"others took {_ATTEMPTS} numbers of {name} in a row", where=self.location, hint="try again")

    def adopt(
        self, record: Record, folder: Path, *, allow_secret_like: bool = False, progress: Progress = SILENT
    ) -> bool:
        try:
            return super().adopt(record, folder, allow_secret_like=allow_secret_like, progress=progress)
        except _Unsent as unsent:
            try:
                self._send(unsent.record, progress)
            except FileExistsError:
                # Says whether it is the same one.
                return self.adopt(record, folder, allow_secret_like=allow_secret_like, progress=progress)
        return True

    def _commit(self, record: Record) -> Record:
        raise _Unsent(record)

    def _send(self, record: Record, progress: Progress) -> None:
        """Raises FileExistsError where the number is taken, having brought in by whom."""
        self._synced = None
        try:
            self.remote.push(record, record.to_bytes(), self.blobs, progress)
        except FileNotFoundError:
            raise Unavailable(
                "the mirror was cleaned meanwhile", where=self.location, hint="publish it again"
            ) from None
        except FileExistsError:
            self._sync()
            raise
        self._sync()

    def _latest(self, name: str) -> str | None:
        with self._opened() as index:
            number = index.latest(name)
        return None if number is None else f"{name}@{number}"

    def tag(self, ref: str, tag: str) -> Version:
        return self._persistently(lambda: super(RemoteRegistry, self).tag(ref, tag))

    def untag(self, name: str, tag: str) -> None:
        self._persistently(lambda: super(RemoteRegistry, self).untag(name, tag))

    def sign(self, ref: str, key: SigningKey) -> Version:
        return self._persistently(lambda: super(RemoteRegistry, self).sign(ref, key))

    def take_over(self, signatures: SignatureList) -> None:
        self._persistently(lambda: super(RemoteRegistry, self).take_over(signatures))

    def remove(self, ref: str, *, force: bool = False) -> builtins.list[Version]:
        return self._persistently(lambda: super(RemoteRegistry, self).remove(ref, force=force))

    def _persistently(self, action: Callable[[], T]) -> T:
        """Once more from the place's newest state where somebody else was there first."""
        self._online()
        for _ in range(_ATTEMPTS):
            self._synced = None
            try:
                return action()
            except _Beaten:
                continue
        raise Unavailable("others write the same document again and again", where=self.location, hint="try again")

    def _write(self, document: DocumentName, data: bytes) -> None:
        self._write_there(document, data, self._marks().get(str(document)))
        super()._write(document, data)

    def _withdraw(self, version: Version) -> None:
        document = DocumentName(version.name, "removed", version.version)
        self._write_there(document, document_bytes(removal(version.name, version.version)), None)
        super()._withdraw(version)

    def _write_there(self, document: DocumentName, data: bytes, mark: str | None) -> None:
        self._synced = None
        try:
            self.remote.write(str(document), data, mark=mark)
        except FileExistsError:
            raise _Beaten from None

    def gc(self, *, dry_run: bool = False) -> Garbage:
        """Removes from the place what no version needs (see `Remote.sweep`); its figures are the place's. The mirror is
        cleaned too."""
        self._persistently(self._sync)
        for document, error in self._damaged.items():
            if document.kind == "record":
                raise Corrupt(f"{document} is damaged, so what it needs is unknown", where=self.location) from error
        needed = set()
        for document in self.records.documents():
            data = self.records.read_bytes(document)
            needed.add(hashlib.sha256(data).hexdigest())
            if document.kind == "record":
                files = Record.from_bytes(data, where=str(document)).files
                needed.update(part.sha256 for file in files for part in file.blobs)
        garbage = Garbage(*self.remote.sweep(needed, dry_run=dry_run))
        if not dry_run:
            partials = self.folder / "partials"
            unneeded = [path for sha256, path in self.blobs.all() if sha256 not in needed]
            for path in (*unneeded, *(partials.iterdir() if partials.is_dir() else ())):
                with suppress(FileNotFoundError):  # it arrived, or another `gc` took it
                    if time.time() - path.stat().st_mtime > _DAY:  # younger ones may be under way
                        path.unlink()
            for path in self.drafts.stale():
                path.unlink(missing_ok=True)
        return garbage

    def rebuild(self, progress: Progress = SILENT) -> Rebuilt:
        """Makes the mirror again from the documents of the place; the contents that it holds stay."""
        self._online()
        for path in (self.folder / "records", self.folder / _MARKS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if (self.folder / MARK).is_file():
            Index.discard_damaged(self.folder / INDEX)
            self._index_anew()
        self._persistently(self._sync)
        restored = tuple(sorted(str(document) for document in self.records.documents()))
        kinds = [parse_document(name).kind for name in restored]
        problems = tuple(f"{document}: {error.what}" for document, error in self._damaged.items())
        return Rebuilt(kinds.count("record"), kinds.count("removed"), restored, problems)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def fetch(self, record: Record, files: Sequence[StoredFile] | None = None, progress: Progress = SILENT) -> None:
        missing = [file for file in (record.files if files is None else files) if not self.blobs.holds(file)]
        if missing and _offline():
            raise Unavailable(
                f"{OFFLINE} is set, and {missing[0].path} was not fetched before",
                where=record.version.ref,
                hint=f"pull {record.version.ref} once without {OFFLINE}",
            )
        if missing:
            with disk_errors(self.folder):
                self.remote.fetch(record, missing, self.blobs, progress)

    def survey(self) -> Iterator[tuple[Version, Details | XpertError]]:
        """As of every registry; the documents that are not here yet are fetched many at a time."""
        with self._open() as index:
            every = index.all()

        def bring(version: Version) -> None:
            with suppress(XpertError):  # what is wrong with a version is told when its turn comes
                record = self._read(version)
                self.fetch(record, _told_by(record))

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(bring, every))
        return super().survey()

    def _details(self, version: Version, numbers: tuple[int, ...], tags: Mapping[str, int]) -> Details:
        record = self._read(version)
        act = functools.partial(super()._details, version, numbers, tags)
        return self._mended(record, _told_by(record), SILENT, act)

    def _take_out(self, record: Record, out: Path | None, progress: Progress) -> Path:
        if out is not None:
            return self._mended(record, record.files, progress, lambda: check_out(self.blobs, record, Path(out)))
        target = cache_folder() / "experts" / record.version.digest
        if is_sound(target, record):
            return target
        return self._mended(record, record.files, progress, lambda: check_out_to_cache(self.blobs, record, progress))

    def _mended(self, record: Record, files: Sequence[StoredFile], progress: Progress, action: Callable[[], T]) -> T:
        """Runs an action that reads contents; where the mirror's own copy is damaged, once more with a new one."""
        self.fetch(record, files, progress)
        try:
            return action()
        except Corrupt:
            damaged = {p.sha256 for f in files for p in f.blobs if self.blobs.problem(p.sha256, p.size)}
            if not damaged:
                raise
            progress.say(f"the mirror's copy of {record.version.ref} is damaged; fetching it again")
            for sha256 in damaged:
                self.blobs.path(sha256).unlink(missing_ok=True)
        self.fetch(record, files, progress)
        return action()

    def verify(self, progress: Progress = SILENT) -> Sequence[Problem]:
        """Reads every file of the place and tells what is unsound there, and in the mirror's index."""
        self._online()
        self._synced = None
        with self._open() as index:
            found: builtins.list[Problem] = []
            intact = {}
            for key, removed in sorted(self.records.listing().items()):
                if not removed:
                    intact[key] = self.records.read(*key)
            found += check_documents(self.records, intact)
            found += check_index(index, self.records, intact)
        found += self.remote.problems(intact.values(), progress)
        told = {problem.where for problem in found}
        damaged = [Problem(str(document), error.what) for document, error in self._damaged.items()]
        return found + [problem for problem in damaged if problem.where not in told]

    def _resolve(self, index: Index, ref: Ref) -> Version:
        try:
            return super()._resolve(index, ref)
        except NotFound:
            for document, error in self._damaged.items():
                if document.name == ref.name and ref.version in (None, document.version):
                    raise Corrupt(
                        f"{document} is damaged there", where=self.location, hint="see `xpert registry verify`"
                    ) from error
            raise

    # ── the mirror ───────────────────────────────────────────────────────────────────────────────────────────────

    def _online(self) -> None:
        if _offline():
            raise Unavailable(f"{OFFLINE} is set, and this needs the place itself", where=self.location)

    @contextmanager
    def _open(self) -> Iterator[Index]:
        self._sync()
        with super()._open() as index:
            yield index

    def _opened(self) -> AbstractContextManager[Index]:
        return super()._open()

    def _sync(self) -> None:
        """Brings in the documents that changed, and drops those that are gone."""
        if _offline():
            if not (self.folder / MARK).is_file():
                raise Unavailable(
                    f"{OFFLINE} is set, and nothing of this registry was fetched before", where=self.location
                )
            return
        with self._syncing:
            if self._synced is not None and time.monotonic() - self._synced < FRESH_SECONDS:
                return
            try:
                self._take_in(self.remote.listing())
            except Unavailable as error:
                if (self.folder / MARK).is_file() and "not installed" not in error.what:
                    error.hint = f"try again, or set {OFFLINE}=1 to use what was fetched before"
                raise
            self._synced = time.monotonic()

    def _take_in(self, listing: Mapping[str, str]) -> None:
        with disk_errors(self.folder), exclusive(self.folder / "sync.lock"):  # one process syncs at a time
            if not (self.folder / MARK).is_file():
                write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA, "mirror_of": self.location})
            marks, named = self._marks(), _named(listing)
            wanted = [
                document
                for document, mark in named.items()
                if marks.get(str(document)) != mark or not self.records.path(document).is_file()
            ]
            self._damaged.clear()
            with ThreadPoolExecutor(_READERS) as pool:
                for document in pool.map(self._bring_in, wanted):
                    if document is not None:
                        marks[str(document)] = named[document]
            gone = [document for document in self.records.documents() if document not in named]
            if wanted or gone or not (self.folder / _MARKS).is_file():
                # The marks come first: a document that is gone from them is looked at again, never the reverse.
                kept = {name: mark for name, mark in marks.items() if name in listing}
                write_file(self.folder / _MARKS, json.dumps(kept))
            else:
                os.utime(self.folder / _MARKS)
            if gone:
                for document in gone:
                    self.records.path(document).unlink(missing_ok=True)
                self._index_anew()

    def _bring_in(self, document: DocumentName) -> DocumentName | None:
        """None where the document is gone again or is not what its name says."""
        where = f"{self.location}: {document}"
        try:
            data = self.remote.read(str(document))
            value = read_checked(data, where=where)
            if document_of(value) != document:
                raise Corrupt(f"holds {document_of(value)}", where=where)
            check_document(document, value)
        except NotFound:
            return None
        except BadInput as error:  # damaged, or of a newer schema: `verify` tells, and the rest is of use
            self._damaged[document] = error
            return None
        self.records.replace(document, data)
        return document

    def _index_anew(self) -> None:
        with Index.open(self.folder / INDEX) as index, index.writing():
            index.forget_all()
            self._follow(index)

    def _marks(self) -> dict[str, str]:
        try:
            found = read_json(self.folder / _MARKS)
        except (NotFound, Corrupt):
            return {}
        return found if isinstance(found, dict) else {}


class _MirrorRecords(RecordFolder):
    """Documents that can be fetched again: written whole, but not forced to the disk.

    `elsewhere` are documents that the place has and the mirror cannot use: their numbers are taken all the same.
    """

    elsewhere: Mapping[DocumentName, object] = MappingProxyType({})

    def numbers(self, name: str) -> dict[int, bool]:
        damaged = {d.version: False for d in self.elsewhere if d.name == name and d.version is not None}
        return {**damaged, **super().numbers(name)}

    def _write(self, target: Path, data: bytes, *, replace: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._drafts.new() as (draft, stream):
            stream.write(data)
            stream.flush()
            os.replace(draft, target) if replace else os.link(draft, target)


class _NoCopies(BlobStore):
    """The place keeps the copies of documents; a mirror needs none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_bytes(self, data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()


def _named(listing: Mapping[str, str]) -> dict[DocumentName, str]:
    found = {}
    for name, mark in listing.items():
        try:
            found[parse_document(name)] = mark
        except BadInput:
            continue  # `verify` tells of it
    return found


def _told_by(record: Record) -> builtins.list[StoredFile]:
    """The file that says what a version is: an expert's card, a mixture's JSON."""
    name = CARD_FILE if record.version.kind == "expert" else MIXTURE_FILE
    return [file for file in record.files if file.path == name]


def _offline() -> bool:
    return os.environ.get(OFFLINE, "") not in ("", "0")
