"""The adapters made for vLLM: folders named by content, bounded in number and bytes, kept while a request uses them.

FOLDER/SHA256/            an adapter, as peft writes one
FOLDER/SHA256.lock        held (shared) by every process that uses it, and (alone) by the one that deletes it
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from xpert.errors import XpertError
from xpert.experts.engines._vllm_adapters import ExpertSet
from xpert.experts.engines._vllm_backend import Backend, Served

__all__ = ["AdapterStore", "AdapterUse"]

PREFIX = "xpert-"
_IDS = 0x7FFFFFFF
"""How many ids there are: vLLM keeps them in signed 32-bit integers in places, and wants them positive."""


@dataclass(frozen=True)
class AdapterUse:
    """Counters since the start. made: folders written; reused: sets asked for that were at hand; evicted: given up."""

    made: int = 0
    reused: int = 0
    evicted: int = 0
    adapters: int = 0
    bytes: int = 0


@dataclass(eq=False)
class _Entry:
    """One adapter. `pins`, `bytes` and `going` are guarded by the store's lock, the rest by the entry's own."""

    served: Served
    pins: int = 0
    bytes: int = 0
    going: bool = False  # chosen to be deleted, and no longer counted
    loaded: bool = False
    hold: int | None = None  # the open lock file while this process uses the folder
    lock: threading.Lock = field(default_factory=threading.Lock)


class AdapterStore:
    """Least recently used adapters go first, once more than `max_adapters` or `max_bytes` are kept.

    Those in use by a request stay whatever the bounds say. Folders of earlier runs are found again and count.
    `write(set, folder)` makes one. `seen_as` is the path of `folder` where vLLM runs.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        write: Callable[[ExpertSet, Path], None],
        *,
        max_adapters: int,
        max_bytes: int,
        seen_as: Path,
    ) -> None:
        self._folder = folder
        self._backend = backend
        self._write = write
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._seen_as = seen_as
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._ids: dict[int, str] = {}
        self._made = self._reused = self._evicted = 0
        self._find_earlier()

    @contextmanager
    def use(self, experts: ExpertSet) -> Iterator[Served]:
        """The set's adapter, made and loaded; it stays while the block runs."""
        entry = self._pin(experts.name)
        try:
            with entry.lock:
                self._make(entry, experts)
                if not entry.loaded:
                    self._backend.load(entry.served)
                    entry.loaded = True
            self._shrink()
            yield entry.served
        finally:
            self._unpin(experts.name, entry)
            self._shrink()

    def load_again(self, experts: ExpertSet) -> None:
        """For a vLLM that has lost the adapter, inside `use`."""
        with self._lock:
            entry = self._entries[experts.name]
        with entry.lock:
            self._backend.load(entry.served)

    def counts(self) -> AdapterUse:
        with self._lock:
            kept = [entry for entry in self._entries.values() if entry.bytes]
            return AdapterUse(self._made, self._reused, self._evicted, len(kept), sum(e.bytes for e in kept))

    def close(self) -> None:
        """Makes vLLM forget this process's adapters; the folders stay for the next run."""
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            with entry.lock:
                self._unload(entry)
                _let_go(entry)

    def _unload(self, entry: _Entry) -> None:
        if entry.loaded:
            entry.loaded = False
            try:
                self._backend.unload(entry.served)
            except XpertError:
                pass  # gone, or it keeps what its name says until it restarts; who asks it next hears of trouble

    def _find_earlier(self) -> None:
        if not self._folder.is_dir():
            return
        found = [path for path in self._folder.iterdir() if path.is_dir() and re.fullmatch("[0-9a-f]{64}", path.name)]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            self._entries[path.name] = _Entry(self._served(path.name), bytes=_size(path))

    def _served(self, name: str) -> Served:
        return Served(PREFIX + name, self._id(name), self._seen_as / name)

    def _id(self, name: str) -> int:
        """A positive integer of the content. Where two contents meet in one, the later gets the next free one."""
        number = int(name, 16) % _IDS + 1
        while self._ids.setdefault(number, name) != name:
            number = number % _IDS + 1
        return number

    def _pin(self, name: str) -> _Entry:
        with self._lock:
            if name not in self._entries:
                self._entries[name] = _Entry(self._served(name))
            entry = self._entries[name]
            entry.pins += 1
            self._entries.move_to_end(name)
            return entry

    def _unpin(self, name: str, entry: _Entry) -> None:
        with self._lock:
            entry.pins -= 1
            if not entry.pins and not entry.bytes:  # it was never made, or is gone
                self._entries.pop(name, None)

    def _make(self, entry: _Entry, experts: ExpertSet) -> None:
        folder = self._folder / experts.name
        if entry.hold is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            entry.hold = _take(folder, fcntl.LOCK_SH)
        there = folder.is_dir()
        if not there:
            self._write(experts, folder)
        os.utime(folder)
        with self._lock:
            entry.bytes = entry.bytes or _size(folder)
            self._reused += there
            self._made += not there

    def _shrink(self) -> None:
        while (entry := self._victim()) is not None:
            name = entry.served.name.removeprefix(PREFIX)
            try:
                with entry.lock:
                    with self._lock:
                        entry.going = entry.pins == 1
                    if entry.going:
                        self._delete(entry, self._folder / name)
            finally:
                self._unpin(name, entry)

    def _victim(self) -> _Entry | None:
        """The least recently used entry that nobody uses, pinned for its removal, if the bounds are passed."""
        with self._lock:
            kept = [entry for entry in self._entries.values() if entry.bytes and not entry.going]
            if len(kept) <= self._max_adapters and sum(entry.bytes for entry in kept) <= self._max_bytes:
                return None
            entry = next((entry for entry in kept if not entry.pins), None)
            if entry is not None:
                entry.pins += 1
                entry.going = True
            return entry

    def _delete(self, entry: _Entry, folder: Path) -> None:
        self._unload(entry)
        _let_go(entry)
        hold = _take(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if hold is not None:  # else another process uses it, and it is that one's to count
            shutil.rmtree(folder, ignore_errors=True)
            _lock_file(folder).unlink(missing_ok=True)
            os.close(hold)
        with self._lock:
            entry.bytes, entry.going = 0, False
            self._evicted += 1


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _take(folder: Path, how: int) -> int | None:
    """The open and locked lock file of an adapter; None where it may not be waited for and is taken."""
    path = _lock_file(folder)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            os.close(handle)
            return None
        try:
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its last holder deleted it meanwhile: what is locked is no longer the file of that name


def _let_go(entry: _Entry) -> None:
    if entry.hold is not None:
        os.close(entry.hold)
        entry.hold = None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
