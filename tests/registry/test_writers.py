"""Writers that meet at the worst moment: each test puts one step of another process where it would do most harm."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from xpert.errors import Unavailable
from xpert.registry import checkout
from xpert.registry import index as index_module
from xpert.registry.blobs import BlobStore
from xpert.registry.copying import copy_versions
from xpert.registry.index import Index
from xpert.registry.store import Registry
from xpert.registry.versions import Record

Maker = Callable[..., Path]


def lose_index(registry: Registry) -> None:
    for path in registry.folder.glob("index.sqlite*"):
        path.unlink()


def test_gc_between_the_contents_of_a_copy_and_its_record(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert("a"), "acme/a")
    target = Registry(tmp_path / "target")
    target.publish(expert("b", seed=1), "acme/b")
    opened = target._open
    swept: list[int] = []

    @contextmanager
    def after_gc() -> Iterator[Index]:
        if not swept:
            swept.append(Registry(target.folder).gc().files)
        with opened() as index:
            yield index

    target._open = after_gc  # type: ignore[method-assign]
    copy_versions(registry, target, ["acme/a"])
    assert swept == [4] and Registry(target.folder).verify() == []


def test_nobody_publishes_while_gc_runs_though_the_index_is_lost(
    registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(expert("a"), "acme/a")
    monkeypatch.setattr("xpert.registry.index_file.WAIT_SECONDS", 0.1)
    every, other = registry.blobs.all, Registry(registry.folder)

    def meanwhile() -> Iterator[tuple[str, Path]]:
        lose_index(registry)
        with pytest.raises(Unavailable, match="keeps the index locked"):
            other.publish(expert("b", seed=1), "acme/b")
        return every()

    monkeypatch.setattr(registry.blobs, "all", meanwhile)
    registry.gc()
    monkeypatch.undo()
    assert other.publish(expert("c", seed=1), "acme/b").version == 1 and other.verify() == []


def test_an_index_that_was_lost_since_it_was_opened(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    with registry._open() as index:
        lose_index(registry)
        with pytest.raises(Unavailable, match="removed meanwhile"), index.writing():
            pass
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]


def test_gc_makes_room_on_a_full_disk(
    registry: Registry, expert: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that cannot be written, as SQLite tells it, and no copy of a document either."""
    registry.publish(expert("a"), "acme/a")
    registry.publish(expert("b", seed=1), "acme/b")
    registry.remove("acme/b")
    (registry.folder / "records/acme/a@1.json").touch()
    prepare = index_module.prepare

    def full(connection: sqlite3.Connection, path: Path | None, full_text: bool) -> None:
        if path is not None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        prepare(connection, path, full_text)

    def no_room(*given: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_module, "prepare", full)
    monkeypatch.setattr(registry.records.copies, "put_bytes", no_room)
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]
    assert (registry.pull("acme/a", tmp_path / "out") / "expert.json").is_file()
    assert registry.gc().files == 5  # the four files and the record's copy
    with pytest.raises(Unavailable, match="disk is full"):
        registry.tag("acme/a", "stable")
    monkeypatch.undo()
    assert registry.verify() == []


def test_two_who_mend_one_cached_copy(registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see the damage; the second may not take away what the first has handed out."""
    registry.publish(expert(), "acme/a")
    folder = registry.pull("acme/a")
    (folder / "README.md").write_text("changed")
    is_sound, both = checkout.is_sound, threading.Barrier(2)
    looked, made = threading.local(), []

    def slowly(folder: Path, record: Record) -> bool:
        sound = is_sound(folder, record)
        if not hasattr(looked, "once"):
            looked.once = True
            both.wait(timeout=30)
        return sound

    def check_out(blobs: BlobStore, record: Record, target: Path) -> Path:
        made.append(target)
        return copy(blobs, record, target)

    copy = checkout.check_out
    monkeypatch.setattr(checkout, "is_sound", slowly)
    monkeypatch.setattr(checkout, "check_out", check_out)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(registry.pull, ["acme/a"] * 2)) == [folder, folder]
    assert len(made) == 1 and is_sound(folder, registry.record("acme/a"))
