"""Which adapters lie on the device and in host memory: room, least recent use, and what to load next.

Bookkeeping alone: no thread, no file, no lock. `AdapterBank` calls it under its lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xpert.errors import XpertError
from xpert.experts.adapters import Adapter
from xpert.experts.engines._bank_options import Handle, ResidencyOptions

if TYPE_CHECKING:
    from xpert.experts.engines._packing import PackedAdapter

__all__ = ["Load", "Tiers", "Version"]


@dataclass(eq=False)
class Version:
    """One version of an expert, and where it lies.

    `coming`: its place on the device is taken, its tensors are on their way. `used`: when it was last loaded, leased
    or given back. `missed`: it was asked for when it was not on the device. `overtaken`: leases of others while it
    waited for room.
    """

    handle: Handle
    host: PackedAdapter | None = None
    device: Adapter | None = None
    ready: Any = None
    coming: bool = False
    leases: int = 0
    used: int = 0
    missed: bool = False
    overtaken: int = 0
    failure: XpertError | None = None
    streams: set[Any] = field(default_factory=set)

    @property
    def on_device(self) -> bool:
        return self.device is not None or self.coming


@dataclass(frozen=True)
class Load:
    """The next thing to do: bring `version` to the device, or into host memory alone. `packed`: its host copy."""

    version: Version
    to_device: bool
    packed: PackedAdapter | None


class Tiers:
    """`one_memory`: the device is the CPU, so that a native adapter on both tiers is the same tensors. These count
    once, as the device's; host_bytes then counts what lies in host memory besides."""

    def __init__(self, options: ResidencyOptions, *, one_memory: bool) -> None:
        self.options = options
        self._one_memory = one_memory
        self.device: dict[Version, None] = {}
        self.host: dict[Version, None] = {}
        self.device_bytes = 0
        self.host_bytes = 0
        self.evictions = 0
        self.host_evictions = 0
        self._clock = itertools.count(1)

    def touch(self, version: Version) -> None:
        version.used = next(self._clock)

    def device_holds(self, size: int, experts: int) -> bool:
        """Whether so much is within the device's limits."""
        limits = self.options
        return (limits.device_bytes is None or size <= limits.device_bytes) and (
            limits.device_experts is None or experts <= limits.device_experts
        )

    def next_load(
        self, order: Sequence[Version], urgent: int, pinned: Collection[Version]
    ) -> tuple[Load | None, int | None]:
        """What to load for `order`, the wanted versions, first first; and the place in it of the first of the `urgent`
        that finds no room on the device, if any.

        A version may take the place of what is not wanted, or wanted after it; never of what is leased or pinned.
        """
        rank = {version: place for place, version in enumerate(order)}
        fixed = [version for version in self.device if version.leases or version in pinned]
        size, experts = sum(version.handle.device_bytes for version in fixed), len(fixed)
        stage = blocked = None
        for place, version in enumerate(order):
            if version.on_device:
                if not (version.leases or version in pinned):
                    size, experts = size + version.handle.device_bytes, experts + 1
            elif version.failure is not None:
                continue
            elif self.device_holds(size + version.handle.device_bytes, experts + 1):
                return Load(version, True, version.host), blocked
            else:
                if blocked is None and place < urgent:
                    blocked = place
                if stage is None and version.host is None and self._host_could_hold(version, rank, pinned):
                    stage = Load(version, False, None)
        return stage, blocked

    def reserve(self, version: Version, order: Sequence[Version], pinned: Collection[Version]) -> list[Version]:
        """Takes a place on the device for `version`, found by `next_load`; returns those that had to leave it,
        least recently used first, then the last wanted."""
        rank = {other: place for place, other in enumerate(order)}
        own = rank[version]
        loose = [
            other
            for other in self.device
            if not other.leases and other not in pinned and rank.get(other, len(order)) > own
        ]
        loose.sort(key=lambda other: (1, -rank[other]) if other in rank else (0, other.used))
        gone: list[Version] = []
        for other in loose:
            if self.device_holds(self.device_bytes + version.handle.device_bytes, len(self.device) + 1):
                break
            self.leave_device(other)
            gone.append(other)
        with self._recounted(version):
            version.coming = True
        self.trim_host(rank, pinned)
        return gone

    def arrive(self, version: Version, adapter: Adapter, ready: Any) -> None:
        version.coming = False
        version.device, version.ready = adapter, ready
        self.touch(version)

    def give_up(self, version: Version) -> None:
        """The load that took a place failed."""
        with self._recounted(version):
            version.coming = False

    def leave_device(self, version: Version) -> None:
        with self._recounted(version):
            version.device = version.ready = None
            version.streams = set()
        self.evictions += 1

    def keep_on_host(
        self, version: Version, packed: PackedAdapter, order: Sequence[Version], pinned: Collection[Version]
    ) -> None:
        """Keeps a host copy where there is room, or room can be made."""
        rank = {other: place for place, other in enumerate(order)}
        if not self._host_could_hold(version, rank, pinned):
            self.host_evictions += 1  # passed through
            return
        self._set_host(version, packed)
        if not version.on_device:
            self.touch(version)
        self.trim_host(rank, pinned)

    def keep_if_free(self, version: Version, packed: PackedAdapter) -> bool:
        """Keeps a host copy where that costs no other its place."""
        limit = self.options.host_bytes
        if limit is not None and self.host_bytes + packed.nbytes > limit:
            return False
        self._set_host(version, packed)
        self.touch(version)
        return True

    def leave_host(self, version: Version) -> None:
        self._set_host(version, None)
        self.host_evictions += 1

    def trim_host(self, rank: dict[Version, int], pinned: Collection[Version]) -> None:
        """Drops host copies, least recently used first, until the limit is kept.

        A wanted or pinned version's only copy goes last, the last wanted first.
        """
        limit = self.options.host_bytes
        if limit is None or self.host_bytes <= limit:
            return
        loose = [version for version in self.host if self._counts(version)]

        def first_out(version: Version) -> tuple[int, int]:
            if not version.on_device and version in pinned:
                return (2, 0)
            if not version.on_device and version in rank:
                return (1, -rank[version])
            return (0, version.used)

        for version in sorted(loose, key=first_out):
            self.leave_host(version)
            if self.host_bytes <= limit:
                return

    def _host_could_hold(self, version: Version, rank: dict[Version, int], pinned: Collection[Version]) -> bool:
        limit = self.options.host_bytes
        if limit is None or (version.on_device and self._shared(version)):
            return True
        own = rank.get(version, len(rank))
        held = sum(
            other.handle.storage.host_bytes
            for other in self.host
            if other is not version
            and self._counts(other)
            and not other.on_device
            and (other in pinned or rank.get(other, len(rank)) < own)
        )
        return held + version.handle.storage.host_bytes <= limit

    def _shared(self, version: Version) -> bool:
        return self._one_memory and version.handle.storage.kind == "native"

    def _counts(self, version: Version) -> bool:
        """Whether a host copy is memory of its own."""
        return version.host is not None and not (version.on_device and self._shared(version))

    def _set_host(self, version: Version, packed: PackedAdapter | None) -> None:
        with self._recounted(version):
            version.host = packed

    @contextmanager
    def _recounted(self, version: Version) -> Iterator[None]:
        self._count(version, -1)
        yield
        self._count(version, 1)

    def _count(self, version: Version, sign: int) -> None:
        if version.on_device:
            self.device_bytes += sign * version.handle.device_bytes
        if self._counts(version):
            self.host_bytes += sign * version.handle.storage.host_bytes
        for held, tier in ((version.on_device, self.device), (version.host is not None, self.host)):
            if held and sign > 0:
                tier[version] = None
            elif sign < 0:
                tier.pop(version, None)
