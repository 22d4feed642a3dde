"""Who wants which versions, and in which order they are loaded.

Demands come first, by age: sets that a thread waits for, and sets that were asked for and not got. Forecasts follow:
what `prefetch` names, each owner's list in its own order, several owners' lists merged by age. A version named twice
stands where it is wanted first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from xpert.errors import BadInput, XpertError
from xpert.experts.engines._bank_options import Handle
from xpert.experts.engines._bank_tiers import Version

__all__ = ["Waiter", "Wants"]


@dataclass(eq=False)
class Waiter:
    """A thread that waits for `versions` to be on the device together; it gets a lease or an error."""

    versions: tuple[Version, ...]
    since: int = 0
    lease: Any = None
    error: XpertError | None = None

    @property
    def answered(self) -> bool:
        return self.lease is not None or self.error is not None


@dataclass
class _Asked:
    """`met`: the set was on the device together, and nobody's list names it: it is held by its recent use alone."""

    versions: tuple[Version, ...]
    since: int
    met: bool = False


@dataclass
class Wants:
    """No lock of its own: `AdapterBank` calls it under its lock."""

    waiters: list[Waiter] = field(default_factory=list)
    _asked: dict[frozenset[Version], _Asked] = field(default_factory=dict)
    _lists: WeakKeyDictionary[object, dict[Version, int]] = field(default_factory=WeakKeyDictionary)
    _clock: itertools.count[int] = field(default_factory=itertools.count)

    def order(self, pinned: Iterable[Version]) -> tuple[list[Version], int]:
        """All wanted versions, first first, and how many of them are pinned or demanded."""
        demands = [(waiter.since, waiter.versions) for waiter in self.waiters if not waiter.answered]
        demands += [(asked.since, asked.versions) for asked in self._asked.values() if not asked.met]
        found = dict.fromkeys(pinned)
        for _, versions in sorted(demands, key=lambda demand: demand[0]):
            found.update(dict.fromkeys(versions))
        urgent = len(found)
        forecasts: list[tuple[int, int, Version]] = []
        for listed in list(self._lists.values()):
            age = 0
            for version, since in listed.items():
                age = max(age, since)  # nothing jumps the queue before what stands ahead of it in its own list
                forecasts.append((age, len(forecasts), version))
        for _, _, version in sorted(forecasts, key=lambda forecast: forecast[:2]):
            found.setdefault(version)
        return list(found), urgent

    def set_list(self, owner: object, versions: Sequence[Version]) -> set[Version]:
        """Replaces an owner's forecast; what stays in it keeps its age.

        Returns what no list names any more: sets asked for with it are wanted no longer.
        """
        earlier = self._lists.get(owner, {})
        now = {version: earlier[version] if version in earlier else next(self._clock) for version in versions}
        if now:
            self._lists[owner] = now
        else:
            self._lists.pop(owner, None)
        dropped = {version for version in earlier if version not in now and not self.listed(version)}
        if dropped:
            self._asked = {versions: asked for versions, asked in self._asked.items() if not versions & dropped}
        return dropped

    def has_list(self, owner: object, versions: Sequence[Version | None]) -> bool:
        """Whether this is the owner's list already."""
        return list(self._lists.get(owner, ())) == versions

    def has_asked(self, versions: Iterable[Version | None]) -> bool:
        """Whether the set is a demand already."""
        asked = self._asked.get(frozenset(version for version in versions if version is not None))
        return asked is not None and not asked.met

    def listed(self, version: Version) -> bool:
        return any(version in versions for versions in list(self._lists.values()))

    def names(self, version: Version) -> bool:
        """Whether anybody wants it."""
        return (
            self.listed(version)
            or any(version in versions for versions in self._asked)
            or any(version in waiter.versions for waiter in self.waiters if not waiter.answered)
        )

    def ask(self, versions: tuple[Version, ...]) -> None:
        """Notes that a set was asked for and not got; asked again it keeps its age."""
        each = frozenset(versions)
        if each not in self._asked:
            self._asked[each] = _Asked(versions, next(self._clock))
        self._asked[each].met = self._is_met(versions)

    def wait(self, waiter: Waiter) -> None:
        waiter.since = next(self._clock)
        self.waiters.append(waiter)

    def granted(self, versions: frozenset[Version]) -> None:
        self._asked.pop(versions, None)

    def arrived(self, version: Version) -> None:
        """`version` is on the device: sets that are complete now are demands no longer, unless a list names them."""
        for versions, asked in self._asked.items():
            if version in versions:
                asked.met = self._is_met(versions)

    def _is_met(self, versions: Collection[Version]) -> bool:
        return all(version.device is not None for version in versions) and not all(map(self.listed, versions))

    def left(self, version: Version) -> None:
        """`version` was evicted: a set that was met and not taken is forgotten."""
        self._asked = {
            versions: asked for versions, asked in self._asked.items() if not (asked.met and version in versions)
        }

    def check(self, fits: Callable[[Iterable[Handle]], None]) -> None:
        """Gives up the sets for which `fits` raises BadInput, as room was pinned since they were asked for."""

        def reason(versions: Iterable[Version]) -> BadInput | None:
            try:
                fits(version.handle for version in versions)
            except BadInput as error:
                return error
            return None

        self._asked = {versions: asked for versions, asked in self._asked.items() if reason(versions) is None}
        for waiter in self.waiters:
            if not waiter.answered:
                waiter.error = reason(waiter.versions)

    def failed(self, version: Version, error: XpertError) -> None:
        self._asked = {versions: asked for versions, asked in self._asked.items() if version not in versions}
        for waiter in self.waiters:
            if version in waiter.versions and not waiter.answered:
                waiter.error = error
