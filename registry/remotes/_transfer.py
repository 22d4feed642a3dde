"""Many transfers at once: a pool of threads with one progress, and downloads that go on where they stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from xpert.errors import Corrupt
from xpert.progress import Progress
from xpert.registry.blobs import BlobStore, sync_folder

__all__ = ["fetch_blob", "in_parallel", "partials_folder", "telling"]

T = TypeVar("T")
_CHUNK = 1 << 20
Told = Callable[[int], None]


def in_parallel(action: Callable[[T], object], items: Iterable[T], workers: int) -> None:
    """Calls `action` on every item, `workers` at a time. The first error stops what has not begun, and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


@contextmanager
def telling(progress: Progress, title: str, total: float) -> Iterator[Told]:
    """A function that any thread may call with the bytes that have travelled."""
    lock = threading.Lock()
    with progress.task(f"{title} (bytes)", total) as task:

        def told(count: int) -> None:
            with lock:
                task.advance(count)

        yield told


def partials_folder(blobs: BlobStore) -> Path:
    """Where downloads under way lie: beside the blobs, each under the sha256 that it will have."""
    return blobs.folder.parent / "partials"


def fetch_blob(
    blobs: BlobStore, sha256: str, size: int, read: Callable[[int, int], bytes], *, piece: int, what: str, told: Told
) -> None:
    """Brings one blob into the store, in pieces that `read(start, end)` gives; goes on after what arrived before.

    The partial file is locked while it grows: of many processes that want a blob, one fetches it. The blob gets its
    name once its content is what it should be. Raises Corrupt, naming `what`, where the place holds other content.
    """
    target = blobs.path(sha256)
    partial = partials_folder(blobs) / sha256
    with _locked(partial) as stream:
        if target.is_file() and target.stat().st_size == size:
            partial.unlink()
            told(size)
            return
        held = stream.seek(0, os.SEEK_END)
        if held > size:
            held = stream.truncate(0)
        told(held)
        _append(stream, held, size, read, piece, told)
        if held and not _is(stream, sha256):
            # What was kept may have been damaged here: once more, from the beginning.
            stream.truncate(0)
            _append(stream, 0, size, read, piece, lambda count: None)
        if not _is(stream, sha256):
            stream.truncate(0)
            raise Corrupt(
                "damaged: what the place holds does not match its sha256",
                where=what,
                hint="publish the expert again from its folder, which puts the file right",
            )
        os.fchmod(stream.fileno(), 0o444)
        os.fsync(stream.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    sync_folder(target.parent)


def _append(stream: BinaryIO, held: int, size: int, read: Callable[[int, int], bytes], piece: int, told: Told) -> None:
    """Adds bytes [held, size) piece by piece; a place that holds fewer ends it early, which the sha256 tells."""
    while held < size:
        data = read(held, min(size, held + piece))[: size - held]
        if not data:
            return
        stream.seek(held)
        stream.write(data)
        stream.flush()
        held += len(data)
        told(len(data))


def _is(stream: BinaryIO, sha256: str) -> bool:
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest() == sha256


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is not there, which no other thread or process holds meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Whoever held it may have given it its final name: then this is another file than the path means.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                    yield stream
                    return
