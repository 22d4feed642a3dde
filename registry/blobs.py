"""Content-addressed files: each lies under the sha256 of its bytes, whole or not at all, and is never changed.

blobs/ab/cdef...    the file whose sha256 is abcdef...
drafts/             files under way; those of dead processes are swept by `gc`
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from xpert.errors import BadInput, Corrupt
from xpert.storage import alive, hash_file

__all__ = ["BlobStore", "Drafts", "open_plain", "sync_folder"]

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
        self._drafts = drafts

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256[2:]

    def put(self, source: Path, sha256: str) -> None:
        """Copies a file in. A sound blob that is there already stays; a damaged one is replaced.

        Raises BadInput where `source` no longer has the content that was examined.
        """
        target = self.path(sha256)
        if target.is_file() and hash_file(target) == sha256:
            return
        with self._drafts.new() as (draft, stream):
            with open_plain(source) as content:
                if _copy(content, stream) != sha256:
                    raise BadInput("changed while it was being published", where=str(source), hint="publish it again")
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)
        sync_folder(target.parent)

    def copy(self, sha256: str, target: Path, *, what: str) -> None:
        """Copies a blob out, checking it on the way; raises Corrupt where it is missing or damaged."""
        try:
            with open_plain(self.path(sha256)) as content, target.open("xb") as stream:
                sound = _copy(content, stream) == sha256
        except FileNotFoundError:
            raise Corrupt("a file of it is missing", where=what, hint=_REMEDY) from None
        if not sound:
            raise Corrupt("damaged: its content does not match its sha256", where=what, hint=_REMEDY)

    def problem(self, sha256: str, size: int | None = None) -> str | None:
        """What is wrong with a blob, in a few words, or None. Reads it whole."""
        path = self.path(sha256)
        try:
            found = path.lstat().st_size
            if path.is_symlink() or not path.is_file():
                return "not a plain file"
            if size is not None and found != size:
                return f"holds {found:,} bytes instead of {size:,}"
            return None if hash_file(path) == sha256 else "damaged: its content does not match its sha256"
        except FileNotFoundError:
            return "missing"

    def all(self) -> Iterator[tuple[str, Path]]:
        """(sha256 or "" for a file that does not belong here, path), sorted."""
        for shard in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if not shard.is_dir() or shard.is_symlink():
                yield "", shard
                continue
            for path in sorted(shard.iterdir()):
                sound = _SHARD.fullmatch(shard.name) and _REST.fullmatch(path.name)
                yield shard.name + path.name if sound else "", path


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


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
