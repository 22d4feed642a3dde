"""Buckets and other places that fsspec reaches: S3, Google and Azure storage, SFTP, SMB, WebDAV and more."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fsspec.registry import known_implementations

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.progress import SILENT, Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.remotes._filesystem import PIECE, Filesystem, Info, mark_of, written
from xpert.registry.remotes._transfer import fetch_blob, in_parallel, telling
from xpert.registry.soundness import Problem
from xpert.registry.versions import Record, StoredFile

__all__ = ["ObjectStore"]

MARK = "registry.json"
SCHEMA = 2
MOST_DOCUMENT = 16 << 20
GRACE = 3600.0
"""Seconds for which contents that no version needs are kept: they may belong to a version under way."""

# What fsspec also calls filesystems: local files, other members' places, those that are only read, and wrappers.
_NO_STORES = {
    *("file", "local", "asynclocal", "hf", "http", "https", "git", "github", "gist", "data", "dask", "jlab", "jupyter"),
    *("reference", "generic", "dir", "cached", "blockcache", "filecache", "simplecache", "zip", "tar", "libarchive"),
    *("async_wrapper", "asyncwrapper", "pyscript"),
}
_SAME = {"s3a": "s3", "gcs": "gs", "ssh": "sftp", "az": "abfs", "abfss": "abfs", "tosfs": "tos", "arrow_hdfs": "hdfs"}
_DOCUMENT = re.compile(r"records/(?P<name>[^/@]+/[^/@]+@[^/]+\.json)")
_BLOB = re.compile(r"blobs/(?P<document>documents/)?(?P<first>[0-9a-f]{2})/(?P<rest>[0-9a-f]{62})")


class ObjectStore:
    """A registry in a bucket or folder that fsspec reaches, in the layout of a local one, without its index.

    Credentials and endpoints are those of the filesystem: its environment variables, its own files, and fsspec's
    configuration (`FSSPEC_S3_ENDPOINT_URL` and the like); none may stand in the address.
    """

    schemes: ClassVar[tuple[str, ...]] = tuple(sorted({"memory", "abfss", *known_implementations} - _NO_STORES))
    cost = (
        "publish: 1 request to look and 1 to write per content, 5 for the record; sync: 1 listing per 1,000 documents"
    )
    source = "fsspec, https://filesystem-spec.readthedocs.io"

    def __init__(self, url: str, *, filesystem: Any = None, root: str | None = None) -> None:
        self.location = _normal(url) if filesystem is None else url
        self.files = Filesystem(self.location, filesystem=filesystem, root=root)
        self._marked = False

    # ── documents ────────────────────────────────────────────────────────────────────────────────────────────────

    def listing(self) -> Mapping[str, str]:
        """See `Remote`. Raises NotFound where there is no registry. One request per 1,000 documents, one at first."""
        found = {}
        for name, info in self.files.find("records").items():
            match = _DOCUMENT.fullmatch(name)
            if match is not None:
                found[match["name"]] = mark_of(info)
        self._check_mark()
        return found

    def read(self, document: str) -> bytes:
        return self.files.read(f"records/{document}", MOST_DOCUMENT)

    def write(self, document: str, data: bytes, *, mark: str | None) -> None:
        self._make()
        self._put_document(data)
        if mark is None:
            self.files.create(f"records/{document}", data)
        else:
            self.files.replace(f"records/{document}", data, mark)
        if document.endswith(".removed.json"):
            for ending in (".json", ".signatures.json"):
                self.files.remove(f"records/{document.removesuffix('.removed.json')}{ending}")

    # ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def push(self, record: Record, data: bytes, blobs: BlobStore, progress: Progress = SILENT) -> None:
        self._make()
        document = f"{record.version.ref}.json"
        if not self.files.conditional:
            progress.say(
                f"{self.files.scheme}:// cannot write under a condition: let nobody else publish "
                f"{record.version.name} at the same moment"
            )
        if self.files.info(f"records/{document}") is not None and self.read(document) != data:
            raise FileExistsError(document)  # before anything travels
        contents = {part.sha256: blobs.path(part.sha256) for file in record.files for part in file.blobs}
        while True:
            begun = time.monotonic()
            self._put_document(data)
            now = self._written(_copy(data))
            self._send(contents, now, f"sending {record.version.ref}", progress)
            if time.monotonic() - begun < GRACE / 3:
                break  # everything was there, and no sweep takes it before the record stands
        self.files.create(f"records/{document}", data)
        if self.files.info(f"records/{record.version.ref}.removed.json") is not None:
            # It was published and removed by others meanwhile: the number is not given out again.
            self.files.remove(f"records/{document}")
            raise FileExistsError(document)

    def fetch(self, record: Record, files: Sequence[StoredFile], blobs: BlobStore, progress: Progress = SILENT) -> None:
        wanted = {}
        for file in files:
            for part in file.blobs:
                path = blobs.path(part.sha256)
                if not (path.is_file() and path.stat().st_size == part.size):
                    wanted[part.sha256] = part.size, f"{record.version.ref}: {file.path}"

        def bring(sha256: str) -> None:
            size, what = wanted[sha256]
            name = _blob(sha256)

            def read(start: int, end: int) -> bytes:
                try:
                    return self.files.range(name, start, end)
                except NotFound:
                    raise Corrupt(
                        f"a content of it is missing in {self.location}",
                        where=what,
                        hint="publish the expert again from its folder, which puts the file right",
                    ) from None

            fetch_blob(blobs, sha256, size, read, piece=PIECE, what=what, told=told)

        if wanted:
            total = sum(size for size, _ in wanted.values())
            with telling(progress, f"fetching {record.version.ref}", total) as told:
                in_parallel(bring, wanted, self.files.workers)

    def _send(self, contents: Mapping[str, Path], now: float, title: str, progress: Progress) -> None:
        """Puts there what is not there, or is there with another content; makes new again what a sweep might take.

        `now` by the place's clock, as are all ages: machines' own clocks differ, and a sweep by one that is ahead would
        take what another is just sending.
        """
        sizes = {sha256: path.stat().st_size for sha256, path in contents.items()}
        with telling(progress, title, sum(sizes.values())) as told:

            def send(sha256: str) -> None:
                name, path = _blob(sha256), contents[sha256]
                info = self.files.info(name)
                if info is None or info["size"] != sizes[sha256] or not _may_be(info, path):
                    self.files.upload(name, path, sha256, told)
                    return
                if _age(info, now) > GRACE / 2:
                    self.files.touch(name, path, sha256)
                told(sizes[sha256])

            in_parallel(send, contents, self.files.workers)

    # ── keeping house ────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, needed: Collection[str], *, dry_run: bool = False) -> tuple[int, int]:
        garbage = {}
        now = time.time() if dry_run else self._now()
        for name, info in self.files.find("blobs").items():
            match = _BLOB.fullmatch(name)
            if match is not None and match["first"] + match["rest"] not in needed and _age(info, now) > GRACE:
                garbage[name] = int(info["size"])

        def drop(name: str) -> None:
            info = self.files.info(name)
            if info is not None and _age(info, now) > GRACE:  # a publish may have made it new again meanwhile
                self.files.remove(name)

        if not dry_run:
            in_parallel(drop, garbage, self.files.workers)
        return len(garbage), sum(garbage.values())

    def problems(self, records: Iterable[Record], progress: Progress = SILENT) -> Iterator[Problem]:
        """See `Remote`. Cost: downloads every content once. That a file's parts make the file, `pull` checks."""
        documents = dict(self.listing())  # before the contents: what is published meanwhile has its contents already
        stored = self.files.find("blobs")
        state, strangers = self._read_contents(stored, progress)
        yield from strangers
        for document in sorted(documents):
            yield from self._check_document(document, state)
        needed = set()
        for record in records:
            ref = record.version.ref
            if f"{ref}.json" not in documents:
                if f"{ref}.removed.json" not in documents:
                    yield Problem(ref, f"its record is missing in {self.location}")
                continue
            for file in record.files:
                for part in file.blobs:
                    needed.add(_blob(part.sha256))
                    what = state.get(_blob(part.sha256), "missing")
                    if what:
                        yield Problem(f"{ref}: {file.path}", f"{what} in {self.location}")
        for name, what in sorted(state.items()):
            if what and name not in needed:
                yield Problem(f"{self.location}/{name}", what)

    def _read_contents(self, stored: Mapping[str, Info], progress: Progress) -> tuple[dict[str, str], list[Problem]]:
        """(name -> what is wrong with it, or ""; what does not belong there)."""
        strangers = [
            Problem(f"{self.location}/{name}", "does not belong here") for name in stored if not _BLOB.fullmatch(name)
        ]
        state: dict[str, str] = {}

        def check(name: str) -> None:
            digest, at, size = hashlib.sha256(), 0, int(stored[name]["size"])
            try:
                while at < size and (data := self.files.range(name, at, min(size, at + PIECE))):
                    digest.update(data)
                    at += len(data)
                    told(len(data))
            except NotFound:
                return  # swept since it was listed
            sound = name.endswith(_blob(digest.hexdigest()).removeprefix("blobs/"))
            state[name] = "" if sound else "damaged: its content does not match its sha256"

        names = [name for name in sorted(stored) if _BLOB.fullmatch(name)]
        total = sum(int(stored[name]["size"]) for name in names)
        with telling(progress, f"verifying {self.location}", total) as told:
            in_parallel(check, names, self.files.workers)
        return state, strangers

    def _check_document(self, document: str, state: Mapping[str, str]) -> Iterator[Problem]:
        try:
            data = self.read(document)
        except NotFound:
            return  # removed since it was listed
        except XpertError as error:
            yield Problem(document, f"{error.what} in {self.location}")
            return
        if state.get(_copy(data), "missing"):
            yield Problem(document, f"not what was written: it has no sound copy among the blobs of {self.location}")

    # ── the mark ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_mark(self) -> None:
        """Raises NotFound where there is no registry, BadInput where a newer xpert made it."""
        if self._marked:
            return
        where = f"{self.location}/{MARK}"
        try:
            value = json.loads(self.files.read(MARK, MOST_DOCUMENT))
        except NotFound as error:
            if error.where != where:
                raise  # no such bucket
            raise NotFound("there is no registry", where=self.location, hint="`registry publish` makes one") from None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or value.get("kind") != "registry" or not isinstance(value.get("schema"), int):
            raise Corrupt("not the mark of a registry", where=where)
        if value["schema"] > SCHEMA:
            raise BadInput(f"made by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
        self._marked = True

    def _make(self) -> None:
        """Makes the place a registry where it is none; refuses one that holds other things."""
        try:
            self._check_mark()
            return
        except NotFound as error:
            if error.where != self.location or "registry" not in error.what:
                raise
        found = self.files.find("")
        if found and MARK not in found:  # else somebody else has made it since
            raise BadInput("not a registry: it holds other things", where=self.location, hint="choose another folder")
        try:
            self.files.create(MARK, json.dumps({"kind": "registry", "schema": SCHEMA}).encode())
        except FileExistsError:
            self._check_mark()  # somebody else made it meanwhile

    def _now(self) -> float:
        """The time by the place's clock."""
        name = f"drafts/{uuid.uuid4().hex}"
        self.files.put(name, b"what time is it?")
        try:
            return self._written(name)
        finally:
            self.files.remove(name)

    def _written(self, name: str) -> float:
        """When an object was written, by the place's clock; our own time where the filesystem does not tell."""
        moment = written(self.files.info(name) or {})
        return time.time() if moment is None else moment

    def _put_document(self, data: bytes) -> None:
        """The document's own blob, from which its place among the records can be made again."""
        self.files.put(_copy(data), data)


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256[2:]}"


def _copy(document: bytes) -> str:
    sha256 = hashlib.sha256(document).hexdigest()
    return f"blobs/documents/{sha256[:2]}/{sha256[2:]}"


def _age(info: Info, now: float) -> float:
    """Seconds since it was written; 0 where the filesystem does not tell, so that it is never swept."""
    moment = written(info)
    return 0.0 if moment is None else now - moment


def _may_be(info: Info, path: Path) -> bool:
    """Whether an object of the right size can be the file: False where its ETag is an MD5, and of something else."""
    etag = str(info.get("ETag", "")).strip('"')
    if re.fullmatch(r"[0-9a-f]{32}", etag) is None:
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == etag


def _normal(url: str) -> str:
    """The address in normal form. Raises BadInput for one that holds credentials or options, or names no place."""
    scheme, _, rest = url.partition("://")
    scheme = _SAME.get(scheme.lower(), scheme.lower())
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        secret = parts.password is not None or (parts.username is not None and scheme in ("s3", "gs"))
    except ValueError:
        raise BadInput("not a valid address", where=f"{scheme}://...") from None
    if secret or parts.query or parts.fragment or "::" in rest:
        raise BadInput(
            "credentials and options may not stand in an address",
            where=f"{scheme}://{'...' if secret else parts.netloc}",
            hint="put them into the environment or the client's own files; see docs/registry/remotes.md",
        )
    path = "/".join(part for part in parts.path.split("/") if part)
    if not parts.netloc and not (scheme == "memory" and path):
        raise BadInput("the address names no bucket or host", where=url, hint=f"write {scheme}://BUCKET/FOLDER")
    if any(part in (".", "..") for part in path.split("/")):
        raise BadInput("the address holds '.' or '..'", where=url, hint="write the folder itself")
    return f"{scheme}://{parts.netloc}{'/' if path else ''}{path}"


PLUGIN = ObjectStore
