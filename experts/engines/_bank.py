"""The adapter bank: any number of experts registered, a bounded number on the device, the others in host memory or on
disk.

Requests ask for sets of experts: `acquire` gives a lease when all are on the device, else says no at once and has
them loaded, in one background thread, while others go on. Least recently used adapters make room; pinned and leased
ones never do, and nothing wanted earlier makes room for what is wanted later (S-LoRA, arXiv:2311.03285, and LoRAX's
adapter exchange, with the order of the requests kept). Adapters are immutable and every load makes new tensors, so
that an eviction touches nothing a pass reads.

    registered (checked when added)  --load-->  host memory (native, int8, int4)  --upload-->  device  --lease-->  pass

Besides what the limits count there is at most one adapter on its way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import ReferenceType, finalize, ref

from xpert.errors import BadInput, Corrupt, Unavailable, XpertError, unknown
from xpert.experts.adapters import Adapter, read_adapter
from xpert.experts.engines._bank_options import Counters, Handle, ResidencyOptions, Storage
from xpert.experts.engines._bank_order import Waiter, Wants
from xpert.experts.engines._bank_tiers import Load, Tiers, Version
from xpert.experts.engines._bank_uploads import Uploads

if TYPE_CHECKING:
    from xpert.experts.engines._packing import PackedAdapter
    from xpert.language_model import LanguageModel

__all__ = ["AdapterBank", "Counters", "Handle", "Lease", "ResidencyOptions", "Storage"]


UNLIMITED = ResidencyOptions()


class Lease:
    """Holds adapters on the device until it is released; `adapters` are in the order asked for.

    Also a context manager. A thread that holds a lease must not wait for another: none may ever come.
    """

    def __init__(self, bank: AdapterBank, versions: tuple[Version, ...]) -> None:
        found = tuple(version.device for version in versions)
        self.adapters: tuple[Adapter, ...] = tuple(adapter for adapter in found if adapter is not None)
        assert len(self.adapters) == len(versions)
        self._bank = bank
        self._versions: frozenset[Version] | None = frozenset(versions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bank.release(self)


class AdapterBank:
    """Adapters for `base`, within the limits of `options`; any thread may call anything.

    `on_evict(adapter)` is called, under no lock, when an adapter leaves the device, before its room is used again: what
    was built from it must be dropped then, or its memory stays taken. `close` ends the background thread; so does
    dropping the bank.
    """

    def __init__(
        self,
        base: LanguageModel,
        options: ResidencyOptions = UNLIMITED,
        *,
        on_evict: Callable[[Adapter], None] | None = None,
    ) -> None:
        self.options = options
        self._base = base
        self._on_evict = on_evict
        self._lock = threading.Condition(threading.Lock())  # guards all below; never held while a file is read
        self._tiers = Tiers(options, one_memory=base.device.type == "cpu")
        self._wants = Wants()
        self._uploads = Uploads(base)
        self._named: dict[str, Version] = {}
        self._pins: set[str] = set()
        self._versions: dict[Handle, Version] = {}
        self._retired: set[Version] = set()
        self._gone: list[Adapter] = []
        self._blocked: tuple[Version, frozenset[Version]] | None = None
        self._hits = self._misses = self._loads = self._bytes_loaded = self._uploaded = self._bytes_uploaded = 0
        self._defect: Exception | None = None
        self._closed = False
        self._owner = threading.Event()  # whose forecast it is where prefetch is not told
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        finalize(self, self._wake.set).atexit = False

    # -- registering

    def add(self, key: str, folder: Path, *, pinned: bool = False) -> Handle:
        """Reads and checks the adapter in `folder` and registers it under `key`.

        The same content under the same key changes nothing but the folder it is loaded from; other content replaces
        it for requests to come. It stays in host memory where there is free room. Raises what `read_adapter` raises,
        and BadInput where it cannot be pinned beside what is pinned.
        """
        from xpert.experts.engines._packing import choose_storage

        adapter = self._read(key, Path(folder))
        packed, storage = choose_storage(adapter, self.options.storage, self.options.tolerance)
        size = adapter.bytes + sum(tensor.nbytes for tensor in adapter.gate_tensors.values())
        handle = Handle(key, adapter.fingerprint, Path(folder), size, storage)
        packed = self._uploads.prepare(packed)
        with self._changing():
            if pinned or key in self._pins:
                self._check_pins({**self._pinned(), key: handle})
            earlier = self._named.get(key)
            version = self._version(handle)
            self._retired.discard(version)
            version.handle, version.failure = handle, None
            self._named[key] = version
            if earlier is not None and earlier is not version:
                self._retired.add(earlier)
            if pinned:
                self._pins.add(key)
            self._wants.check(self._check_fits)
            if version.host is None and self._tiers.keep_if_free(version, packed):
                self._loads += 1
                self._bytes_loaded += storage.host_bytes
        return handle

    def remove(self, key: str) -> None:
        """Forgets an expert; leases of it go on, and requests that wait for it are served. Raises NotFound."""
        with self._changing():
            version = self._find(key)
            del self._named[key]
            self._pins.discard(key)
            self._retired.add(version)

    def resolve(self, key: str) -> Handle:
        """The version that `key` means now. Raises NotFound with the nearest name."""
        with self._lock:
            return self._find(key).handle

    @property
    def experts(self) -> dict[str, str]:
        """Key -> content fingerprint of the registered experts."""
        with self._lock:
            return {key: version.handle.fingerprint for key, version in self._named.items()}

    def storage(self, key: str) -> Storage:
        """The form an expert is kept in, and the error that this form has."""
        return self.resolve(key).storage

    def pin(self, key: str) -> None:
        """Keeps an expert on the device, and loads it. Raises NotFound, and BadInput where there is no room for it."""
        with self._changing():
            version = self._find(key)
            self._check_pins({**self._pinned(), key: version.handle})
            self._pins.add(key)
            self._wants.check(self._check_fits)

    def unpin(self, key: str) -> None:
        """Lets an expert be evicted again; no error where it was not pinned. Raises NotFound for an unknown key."""
        with self._changing():
            self._find(key)
            self._pins.discard(key)

    # -- asking

    def prefetch(self, handles: Iterable[Handle], *, owner: object | None = None) -> None:
        """Says what will be asked for, soonest first, in place of what the same owner said before; never waits.

        It is loaded to the device as room allows, else to host memory, and none of it is evicted for what is wanted
        after it. Sessions that share a bank each name themselves as `owner` (held weakly).
        """
        handles = list(dict.fromkeys(handles))
        owner = self._owner if owner is None else owner
        with self._lock:
            self._check_usable()
            if self._wants.has_list(owner, [self._versions.get(handle) for handle in handles]):
                return  # said at every step of a session: nothing has changed
        with self._changing():
            versions = [self._version(handle) for handle in handles]
            for version in self._wants.set_list(owner, versions):
                version.failure = None

    def acquire(self, handles: Sequence[Handle]) -> Lease | None:
        """A lease of all, or None at once where one is not on the device; then they are loaded, and asking again gets
        them in finite time. None also where `failure` knows why one cannot come.

        A set whose adapters are all there is kept back only while another has waited for room through `patience`
        leases. Raises BadInput where the set can never be on the device at once.
        """
        with self._lock:
            self._check_usable()
            known = [self._versions.get(handle) for handle in handles]
            if self._wants.has_asked(known) and not self._may_lease(known):
                return None  # asked at every step of a session: nothing has changed
        with self._changing():
            versions = tuple(map(self._version, handles))
            self._check_fits(handles)
            if any(version.failure is not None for version in versions):
                return None
            if self._may_lease(versions):
                lease = self._lease(versions)
            else:
                self._note_misses(versions)
                self._wants.ask(versions)
                return None
        self._uploads.use(versions)
        return lease

    def wait(self, handles: Sequence[Handle], timeout: float | None = None) -> Lease:
        """As `acquire`, but waits; those who wait are served in their order where room is short.

        Raises BadInput where the set can never fit, the error of a load that failed, and Unavailable after `timeout`
        seconds.
        """
        with self._changing():
            versions = tuple(map(self._version, handles))
            self._check_fits(handles)
            for version in versions:
                version.failure = None
            if self._may_lease(versions):
                lease = self._lease(versions)
                waiter = None
            else:
                self._note_misses(versions)
                waiter = Waiter(versions)
                self._wants.wait(waiter)
        if waiter is not None:
            lease = self._await(waiter, timeout)
        self._uploads.use(versions)
        return lease

    def release(self, lease: Lease) -> None:
        """Ends a lease; ending it twice is no error."""
        with self._changing(open=False):
            versions, lease._versions = lease._versions or (), None
            for version in versions:
                version.leases -= 1
                self._tiers.touch(version)

    def failure(self, handles: Iterable[Handle]) -> XpertError | None:
        """Why one of these could not be loaded, if that is so.

        Said for as long as a prefetch list names the expert, so that all who wait for it hear of it, and otherwise
        once; after that it is tried anew.
        """
        with self._changing():
            for version in map(self._version, handles):
                if version.failure is not None:
                    error = version.failure
                    if not self._wants.listed(version):
                        version.failure = None
                    return error
        return None

    def fits(self, handles: Iterable[Handle]) -> None:
        """Raises BadInput, naming the experts, where they can never be on the device at once."""
        with self._lock:
            self._check_fits(handles)

    @property
    def counters(self) -> Counters:
        with self._lock:
            tiers = self._tiers
            return Counters(
                hits=self._hits,
                misses=self._misses,
                loads=self._loads,
                uploads=self._uploaded,
                evictions=tiers.evictions,
                host_evictions=tiers.host_evictions,
                bytes_loaded=self._bytes_loaded,
                bytes_uploaded=self._bytes_uploaded,
                device_bytes=tiers.device_bytes,
                host_bytes=tiers.host_bytes,
                experts=len(self._named),
                resident=sum(version.device is not None for version in tiers.device),
                in_host=len(tiers.host),
            )

    def close(self) -> None:
        """Ends the background thread and drops everything; leased adapters live on with their holders."""
        with self._changing(open=False):
            self._closed = True
            error = Unavailable("the adapter bank was closed")
            for waiter in self._wants.waiters:
                if not waiter.answered:
                    waiter.error = error
            self._wants = Wants()
            self._named.clear()
            self._pins.clear()
            for version in list(self._versions.values()):
                self._drop(version)
            self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- under the lock

    @contextmanager
    def _changing(self, *, open: bool = True) -> Iterator[None]:
        """Holds the lock; then wakes who may go on, and says, without the lock, what left the device."""
        gone: list[Adapter] = []
        try:
            with self._lock:
                if open:
                    self._check_usable()
                try:
                    yield
                finally:
                    self._settle()
                    gone, self._gone = self._gone, []
                    self._lock.notify_all()
        finally:
            errors = [error for error in map(self._told, gone) if error is not None]
            if errors:
                raise errors[0]

    def _check_usable(self) -> None:
        if self._closed:
            raise Unavailable("the adapter bank was closed")
        if self._defect is not None:
            raise RuntimeError("the bank's loading has failed") from self._defect

    def _told(self, adapter: Adapter) -> Exception | None:
        try:
            if self._on_evict is not None:
                self._on_evict(adapter)
        except Exception as error:  # whatever the hook raises; the others are told first, then it is raised
            return error
        return None

    def _settle(self) -> None:
        """After every change: who waits and can be served is, what nobody can ask for is dropped, what is wanted is
        loaded."""
        if self._closed:
            return
        load = self._next()
        for waiter in self._wants.waiters:
            if not waiter.answered and self._may_lease(waiter.versions):
                waiter.lease = self._lease(waiter.versions)
                load = self._next()
        for version in list(self._retired):
            idle = not (version.leases or version.coming or version.failure)
            if idle and not self._wants.names(version):
                self._drop(version)
        if load is not None:
            self._start()

    def _drop(self, version: Version) -> None:
        self._leave_device(version)
        if version.host is not None:
            self._tiers.leave_host(version)
        self._versions.pop(version.handle, None)
        self._retired.discard(version)

    def _leave_device(self, version: Version) -> None:
        if version.device is not None:
            self._gone.append(version.device)
            self._tiers.leave_device(version)
            self._wants.left(version)

    def _find(self, key: str) -> Version:
        if key not in self._named:
            raise unknown("expert", key, self._named)
        return self._named[key]

    def _version(self, handle: Handle) -> Version:
        """The state of a handle's version; one that was replaced or removed lives for as long as it is wanted."""
        version = self._versions.get(handle)
        if version is None:
            version = self._versions[handle] = Version(handle)
            self._retired.add(version)
        return version

    def _pinned(self) -> dict[str, Handle]:
        return {key: self._named[key].handle for key in sorted(self._pins)}

    def _check_pins(self, pinned: dict[str, Handle]) -> None:
        size = sum(handle.device_bytes for handle in pinned.values())
        if not self._tiers.device_holds(size, len(pinned)):
            raise BadInput(
                f"the pinned experts {_listed(sorted(pinned))} take {_amount(size, len(pinned))} together, "
                f"but the device holds {self._limits()}",
                hint="pin fewer, or raise the device's limit",
            )

    def _check_fits(self, handles: Iterable[Handle]) -> None:
        asked = dict.fromkeys(handles)
        pinned = [handle for handle in self._pinned().values() if handle not in asked]
        size = sum(handle.device_bytes for handle in asked)
        held = sum(handle.device_bytes for handle in pinned)
        if asked and not self._tiers.device_holds(size + held, len(asked) + len(pinned)):
            beside = f" beside the pinned {_listed(handle.key for handle in pinned)}" if pinned else ""
            raise BadInput(
                f"{_listed(handle.key for handle in asked)} take {_amount(size, len(asked))} on the device at once"
                f"{f' and the pinned ones {_amount(held, len(pinned))}' if pinned else ''}, "
                f"but it holds {self._limits()}: they never fit{beside}",
                hint="use fewer experts in one request, or raise the device's limit",
            )

    def _limits(self) -> str:
        limits = self.options
        parts = [f"{limits.device_bytes:,} bytes"] if limits.device_bytes is not None else []
        if limits.device_experts is not None:
            parts.append(f"{limits.device_experts:,} expert{'s' if limits.device_experts != 1 else ''}")
        return " and ".join(parts)

    def _may_lease(self, versions: Sequence[Version | None]) -> bool:
        if any(version is None or version.device is None for version in versions):
            return False
        if self._blocked is None:
            return True
        blocked, ahead = self._blocked
        return blocked.overtaken < self.options.patience or ahead.issuperset(versions)

    def _hold(self, versions: Sequence[Version]) -> None:
        each = frozenset(versions)
        for version in each:
            version.leases += 1
            self._tiers.touch(version)
            self._misses += version.missed
            self._hits += not version.missed
            version.missed = False
        self._wants.granted(each)
        if self._blocked is not None and not self._blocked[1].issuperset(each):
            self._blocked[0].overtaken += 1

    def _lease(self, versions: tuple[Version, ...]) -> Lease:
        self._hold(versions)
        return Lease(self, versions)

    def _note_misses(self, versions: Iterable[Version]) -> None:
        for version in versions:
            version.missed |= version.device is None

    def _await(self, waiter: Waiter, timeout: float | None) -> Lease:
        try:
            with self._lock:
                self._lock.wait_for(lambda: waiter.answered or self._defect is not None, timeout)
                if waiter.lease is not None:
                    lease: Lease = waiter.lease
                    return lease
                if waiter.error is not None:
                    raise waiter.error
                self._check_usable()
            names = _listed(version.handle.key for version in waiter.versions)
            raise Unavailable(f"{names} did not come to the device within {timeout:g} seconds")
        except BaseException:
            with self._changing(open=False):
                waiter.error = waiter.error or Unavailable("given up")
            if waiter.lease is not None:  # granted in the meantime
                self.release(waiter.lease)
            raise
        finally:
            with self._lock:
                if waiter in self._wants.waiters:
                    self._wants.waiters.remove(waiter)

    # -- loading, in the background thread

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve, args=(ref(self), self._wake), name="xpert-adapter-bank", daemon=True
            )
            self._thread.start()
        self._wake.set()

    def _pinned_versions(self) -> dict[Version, None]:
        return {self._named[key]: None for key in sorted(self._pins)}

    def _next(self) -> Load | None:
        """What to load next; notes which demand finds no room."""
        pinned = self._pinned_versions()
        order, urgent = self._wants.order(pinned)
        if not order:
            self._blocked = None
            return None
        load, blocked = self._tiers.next_load(order, urgent, pinned)
        self._blocked = None if blocked is None else (order[blocked], frozenset(order[: blocked + 1]))
        return load

    def _load_next(self) -> bool:
        """Loads one adapter. False where nothing is wanted that there is room for."""
        load = None
        try:
            with self._changing():
                load = self._next()
                if load is not None and load.to_device:
                    self._make_room(load.version)
            if load is None:
                return False
            packed = load.packed or self._load(load.version.handle)
            adapter, ready = self._uploads.upload(packed) if load.to_device else (None, None)
        except Exception as error:  # a failing load is this expert's failure, not the end of loading
            if load is None:
                raise
            with self._changing(open=False):
                self._fail(load, error)
        else:
            with self._changing(open=False):
                self._install(load, packed, adapter, ready)
        return True

    def _make_room(self, version: Version) -> None:
        pinned = self._pinned_versions()
        leaving = {other: other.device for other in self._tiers.device}
        for other in self._tiers.reserve(version, self._wants.order(pinned)[0], pinned):
            self._wants.left(other)
            adapter = leaving[other]
            if adapter is not None:
                self._gone.append(adapter)

    def _load(self, handle: Handle) -> PackedAdapter:
        from xpert.experts.engines._packing import pack_adapter

        try:
            adapter = self._read(handle.key, handle.folder)
        except XpertError as error:
            raise type(error)(f"expert {handle.key!r}: {error.what}", where=error.where, hint=error.hint) from error
        if adapter.fingerprint != handle.fingerprint:
            raise Corrupt(
                f"the files of expert {handle.key!r} have changed since it was added",
                where=str(handle.folder),
                hint="add it again to serve the new ones",
            )
        return self._uploads.prepare(pack_adapter(adapter, handle.storage.kind))

    def _read(self, key: str, folder: Path) -> Adapter:
        import torch

        try:
            return read_adapter(key, folder, self._base, device=torch.device("cpu"))
        except OSError as error:
            raise Unavailable(f"cannot be read: {error}", where=str(folder)) from error

    def _install(self, load: Load, packed: PackedAdapter, adapter: Adapter | None, ready: Any) -> None:
        version = load.version
        if adapter is not None:
            self._tiers.arrive(version, adapter, ready)
            version.overtaken = 0
            self._uploaded += 1
            if version.handle.storage.kind != "native" or self._base.device.type != "cpu":
                self._bytes_uploaded += version.handle.device_bytes
        if load.packed is None:
            self._loads += 1
            self._bytes_loaded += version.handle.storage.host_bytes
            pinned = self._pinned_versions()
            if version.host is None:
                self._tiers.keep_on_host(version, packed, self._wants.order(pinned)[0], pinned)
            else:
                self._tiers.host_evictions += 1  # added again in the meantime, and kept: this copy goes
        self._wants.arrived(version)
        if self._closed:
            self._drop(version)

    def _fail(self, load: Load, error: Exception) -> None:
        version = load.version
        if version.coming:
            self._tiers.give_up(version)
        if isinstance(error, XpertError):
            failure = error.with_traceback(None)  # its frames would keep tensors alive
        else:
            failure = XpertError(f"expert {version.handle.key!r} could not be loaded: {error!r}")
            failure.__cause__ = error
        version.failure = failure
        self._wants.failed(version, failure)


def _serve(bank: ReferenceType[AdapterBank], wake: threading.Event) -> None:
    """The background thread: holds the bank only while it loads, so that a bank nobody uses can go."""
    while True:
        wake.wait()
        wake.clear()
        while True:
            alive = bank()
            if alive is None or alive._closed:
                return
            try:
                more = alive._load_next()
            except Exception as error:  # the thread has no caller: the defect is raised to those who ask and wait
                with alive._lock:
                    if not alive._closed:
                        alive._defect = error  # said to all who ask and wait
                    alive._lock.notify_all()
                return
            del alive
            if not more:
                break


def _listed(keys: Iterable[str]) -> str:
    names = [repr(key) for key in keys]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def _amount(size: int, experts: int) -> str:
    return f"{size:,} bytes ({experts:,} expert{'s' if experts != 1 else ''})"
