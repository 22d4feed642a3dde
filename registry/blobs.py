"""Content-addressed files: each lies under the sha256 of its bytes, whole or not at all, and is never changed.

blobs/ab/cdef...    the file, or part of one, whose sha256 is abcdef...
drafts/             files under way; those of dead processes are swept by `gc`
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xpert.errors import BadInput, Corrupt
from xpert.registry.versions import Part, StoredFile
from xpert.storage import alive, hash_file

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

__all__ = ["DOCUMENTS", "BlobStore", "Drafts", "open_plain", "sync_folder"]

_CHUNK = 1 << 20
_SHARD, _REST = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{62}")
_DAY = 86_400.0


class Drafts:
    """Files being written, named after their process so that those of dead ones can be told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"

    @contextmanager
    def new(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new empty file, closed and removed when the block ends; rename or link it inside the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._host}.{os.getpid()}.{uuid.uuid4().hex}"
        try:
            with path.open("xb") as stream:
                yield path, stream
        finally:
            path.unlink(missing_ok=True)

    def stale(self) -> list[Path]:
        """Drafts of processes of this machine that have ended, and of other machines once a day old."""
        found = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            host, _, process = path.stem.rpartition(".")
            if host == self._host and process.isdigit():
                dead = not alive(int(process))
            else:
                dead = time.time() - path.lstat().st_mtime > _DAY
            if dead:
                found.append(path)
        return found


class BlobStore:
    """The blobs of one registry. Writing is safe among many processes: equal names hold equal bytes."""

    def __init__(self, folder: Path, drafts: Drafts) -> None:
        self.folder = folder
        self.drafts = drafts

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256[2:]

    def put(self, source: Path | bytes, file: StoredFile) -> None:
        """Copies a file in, part by part. Sound blobs that are there already stay; damaged ones are replaced.

        Raises BadInput where `source` no longer has the content that was examined.
        """
        with io.BytesIO(source) if isinstance(source, bytes) else open_plain(source) as content:
            for part in file.blobs:
                if self.path(part.sha256).is_file() and hash_file(self.path(part.sha256)) == part.sha256:
                    content.seek(part.size, os.SEEK_CUR)
                elif not self._write(content, part):
                    raise BadInput(
                        "changed while it was being published",
                        where=file.path if isinstance(source, bytes) else str(source),
                        hint="publish it again",
                    )

    def put_bytes(self, data: bytes) -> str:
        """Keeps a small content, and returns its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.put(data, StoredFile("content", len(data), sha256))
        return sha256

    def holds(self, file: StoredFile) -> bool:
        """Whether all blobs of a file are there, by their sizes."""
        try:
            return all(self.path(part.sha256).stat().st_size == part.size for part in file.blobs)
        except FileNotFoundError:
            return False

    def copy(self, file: StoredFile, target: Path, *, what: str) -> None:
        """Copies a file out, checking it on the way, part by part and whole.

        Raises Corrupt where a part is missing or damaged; `target` then holds what came before it.
        """
        whole = hashlib.sha256()
        try:
            with target.open("xb") as stream:
                for part in file.blobs:
                    with open_plain(self.path(part.sha256)) as content:
                        if _copy(content, stream, part.size + 1, whole) != (part.sha256, part.size):
                            raise Corrupt(_DAMAGED, where=what, hint=_REMEDY)
        except FileNotFoundError:
            raise Corrupt("a file of it is missing", where=what, hint=_REMEDY) from None
        if whole.hexdigest() != file.sha256:
            raise Corrupt("its parts are sound, but make another file than the record says", where=what)

    def read(self, file: StoredFile, *, most: int, what: str) -> bytes:
        """A small file's content, checked; raises BadInput where it is larger than `most` bytes."""
        if file.size > most:
            raise BadInput(f"{file.size:,} bytes; the most is {most:,}", where=what)
        whole = io.BytesIO()
        try:
            for part in file.blobs:
                with open_plain(self.path(part.sha256)) as content:
                    if _copy(content, whole, part.size + 1) != (part.sha256, part.size):
                        raise Corrupt(_DAMAGED, where=what, hint=_REMEDY)
        except FileNotFoundError:
            raise Corrupt("a file of it is missing", where=what, hint=_REMEDY) from None
        return whole.getvalue()

    def problem(self, sha256: str, size: int | None = None) -> str | None:
        """What is wrong with a blob, in a few words, or None. Reads it whole."""
        path = self.path(sha256)
        try:
            found = path.lstat().st_size
            if path.is_symlink() or not path.is_file():
                return "not a plain file"
            if size is not None and found != size:
                return f"holds {found:,} bytes instead of {size:,}"
            return None if hash_file(path) == sha256 else _DAMAGED
        except FileNotFoundError:
            return "missing"

    def all(self) -> Iterator[tuple[str, Path]]:
        """(sha256 or "" for a file that does not belong here, path), sorted; the folder of documents is passed over."""
        for shard in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if shard.name == DOCUMENTS and shard.is_dir():
                continue
            if not shard.is_dir() or shard.is_symlink():
                yield "", shard
                continue
            for path in sorted(shard.iterdir()):
                sound = _SHARD.fullmatch(shard.name) and _REST.fullmatch(path.name)
                yield shard.name + path.name if sound else "", path

    def _write(self, content: BinaryIO, part: Part) -> bool:
        """The next bytes of `content` as a blob; False where they are not the part's."""
        target = self.path(part.sha256)
        with self.drafts.new() as (draft, stream):
            if _copy(content, stream, part.size) != (part.sha256, part.size):
                return False
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)
        sync_folder(target.parent)
        return True


DOCUMENTS = "documents"
"""The folder inside `blobs/` that holds documents: no content that somebody publishes can pass for one."""

_DAMAGED = "damaged: its content does not match its sha256"
_REMEDY = "publish the expert again from its folder, which puts the file right"


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file for reading; raises BadInput for a symbolic link or a special file, without following it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise BadInput("a symbolic link", where=str(path), hint="put the file itself there") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput("not a plain file", where=str(path), hint="remove it from the folder")
    return os.fdopen(descriptor, "rb")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: BinaryIO, target: BinaryIO, most: int, whole: Hash | None = None) -> tuple[str, int]:
    """Copies up to `most` bytes; the sha256 and the number of what was copied."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(min(_CHUNK, most - size)):
        digest.update(chunk)
        if whole is not None:
            whole.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return digest.hexdigest(), size
