"""Places for the tests of remote registries. A kind of place is one entry of PLACES: a fixture that gives a `Place`."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.remote import Remote
from xpert.registry.remotes.object_store import ObjectStore
from xpert.registry.versions import Part, Record, StoredFile, Version, content_digest

STORES = ("memory_place", "folder_place", "s3_place")
"""Places that fsspec reaches."""
PLACES = (*STORES,)


@dataclass
class Place:
    """One empty place: `remote()` opens it anew, as another process would; the rest reaches behind its back."""

    remote: Callable[..., Remote]
    names: Callable[[], set[str]]
    read: Callable[[str], bytes]
    spoil: Callable[[str, bytes | None], None]
    """Writes an object, or removes it."""


class Watched:
    """A filesystem that tells a function of every call before it is made; the function may raise in its place."""

    def __init__(self, filesystem: Any, tell: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._filesystem, self._tell = filesystem, tell

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        if not callable(found):
            return found

        def called(*given: Any, **named: Any) -> Any:
            self._tell(name, given, named)
            return found(*given, **named)

        return called


def place_of(filesystem: Any, root: str, location: str, *, by_url: bool) -> Place:
    def remote(tell: Callable[..., None] | None = None) -> Remote:
        if by_url and tell is None:
            return ObjectStore(location)
        used = filesystem if tell is None else Watched(filesystem, tell)
        return ObjectStore(location, filesystem=used, root=root)

    def names() -> set[str]:
        filesystem.invalidate_cache()
        return {name.split(f"{root.lstrip('/')}/", 1)[1] for name in filesystem.find(root)}

    def spoil(name: str, data: bytes | None) -> None:
        if data is None:
            filesystem.rm_file(f"{root}/{name}")
        else:
            filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(f"{root}/{name}", data)

    return Place(remote, names, lambda name: filesystem.cat_file(f"{root}/{name}"), spoil)


@pytest.fixture
def memory_place() -> Place:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"/{uuid.uuid4().hex}/shelf"
    return place_of(MemoryFileSystem(), root, f"memory:/{root}", by_url=True)


@pytest.fixture
def folder_place(tmp_path: Path) -> Place:
    """A place without conditional writes, where files are moved into their names."""
    from fsspec.implementations.local import LocalFileSystem

    root = str(tmp_path / "place")
    return place_of(LocalFileSystem(), root, "elsewhere://place", by_url=False)


@functools.cache
def _serve_s3() -> str:
    """One server for the whole run, whichever modules ask: s3fs keeps its connections in a cache of the process."""
    script = Path(__file__).with_name("s3_server.py")
    server = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None

    def end() -> None:
        server.kill()
        server.wait()

    atexit.register(end)
    with server.stdout:
        return server.stdout.readline().strip()


@pytest.fixture(scope="session")
def s3_server() -> str:
    return _serve_s3()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://...` of a new bucket on a server of this machine, which the environment's settings reach."""
    s3fs = pytest.importorskip("s3fs")
    settings = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith(("AWS_PROFILE", "AWS_SESSION", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3_place(s3_bucket: str) -> Place:
    import s3fs

    location = f"{s3_bucket}/team/shelf"
    return place_of(s3fs.S3FileSystem(use_listings_cache=False), location.removeprefix("s3://"), location, by_url=True)


def make_version(
    folder: Path, files: dict[str, list[bytes]], *, name: str = "acme/sums", number: int = 1, created: str = "now"
) -> tuple[Record, bytes, BlobStore]:
    """A version of files that are given as their parts: its record, its document, and the store that holds it."""
    store, stored = BlobStore(folder / "blobs", Drafts(folder / "drafts")), []
    for path, parts in files.items():
        for data in parts:
            path_there = store.path(hashlib.sha256(data).hexdigest())
            path_there.parent.mkdir(parents=True, exist_ok=True)
            path_there.write_bytes(data)
        whole = b"".join(parts)
        cut = tuple(Part(hashlib.sha256(data).hexdigest(), len(data)) for data in parts) if len(parts) > 1 else ()
        stored.append(StoredFile(path, len(whole), hashlib.sha256(whole).hexdigest(), cut))
    held = tuple(stored)
    version = Version(name, number, "expert", content_digest(held), created, sum(file.size for file in held))
    record = Record(version, held)
    return record, record.to_bytes(), store
