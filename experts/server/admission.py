"""Who may come in: a bounded number of replies that are computed or wait, and when to come again where it is full."""

from __future__ import annotations

import time
from collections.abc import Callable

from xpert.errors import BadInput
from xpert.experts.server.failures import Busy

__all__ = ["Admission"]

_SMOOTH = 0.1
"""Weight of the newest reply in the mean time between two."""


class Admission:
    """Counts places; one for each reply that a request asks for. Used on the event loop alone, so it needs no lock."""

    def __init__(self, max_batch: int, max_queue: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.used = 0
        self.refused = 0
        self._clock = clock
        self._between: float | None = None
        self._last: float | None = None

    @property
    def most(self) -> int:
        return self.max_batch + self.max_queue

    @property
    def waiting(self) -> int:
        """Replies that have no place in a full batch; an estimate, since who computes is the engine's to say."""
        return max(0, self.used - self.max_batch)

    def enter(self, places: int) -> None:
        """Raises Busy where that many places are not free, BadInput where there are not so many at all."""
        if places > self.most:
            raise BadInput(
                f"the request asks for {places} replies, and this server takes {self.most} at a time",
                hint="ask for fewer at once",
            )
        if self.used + places > self.most:
            self.refused += 1
            raise Busy(
                f"the queue is full: {self.max_batch} replies run and {self.max_queue} wait",
                retry_after=self.wait_for(places),
                hint="come again after the seconds in Retry-After",
            )
        self.used += places

    def leave(self, places: int) -> None:
        self.used -= places
        now = self._clock()
        if self._last is not None:
            between = (now - self._last) / places
            self._between = between if self._between is None else self._between + _SMOOTH * (between - self._between)
        # A server that had nothing to do says nothing about how fast it is.
        self._last = now if self.used else None

    def wait_for(self, places: int) -> float:
        """Seconds until that many places should be free, by the pace of late; from 1 to 60."""
        missing = self.used + places - self.most
        return min(60.0, max(1.0, missing * (self._between if self._between is not None else 1.0)))
