"""The requests that have no place in the batch yet, and who of them is next.

The oldest goes first, and beside it those nearest to it in the tokens they have to compute: little padding, and nobody
waits for ever. A request whose adapters are still on their way is passed over and holds nobody up; that others do not
keep them off a full device for ever is the bank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from xpert.errors import XpertError
from xpert.experts.engines._requests import InFlight

if TYPE_CHECKING:
    from xpert.experts.engines._bank import AdapterBank, Handle

__all__ = ["PREFILL_TOKENS", "Waiting"]

PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill pass, unless one prompt is longer; bounds memory and the wait of the others."""
LOOKAHEAD = 256
"""Requests of the queue whose adapters are fetched ahead, and among whom those of like length are sought."""


class Waiting:
    """A queue, used under its session's lock. `fresh` tells how many tokens a request has to compute."""

    def __init__(self, bank: AdapterBank, fresh: Callable[[InFlight], int]) -> None:
        self._bank = bank
        self._fresh = fresh
        self._queue: list[InFlight] = []
        self._wanted: list[Handle] = []
        self.failed: list[tuple[InFlight, XpertError]] = []
        """Requests whose adapters could not be loaded, out of the queue."""

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def requests(self) -> Sequence[InFlight]:
        return self._queue

    def add(self, request: InFlight) -> None:
        self._queue.append(request)

    def drop(self, ids: set[str]) -> None:
        self._queue = [request for request in self._queue if request.id not in ids]

    def fetch_ahead(self) -> None:
        """Tells the bank what is wanted, oldest first."""
        wanted = [handle for request in self._queue[:LOOKAHEAD] for handle in request.handles]
        if wanted != self._wanted:
            self._wanted = wanted
            self._bank.prefetch(wanted, owner=self)

    def choose(self, places: int) -> list[InFlight]:
        """Takes out those that are admitted now, with a lease on their adapters, into so many free lanes."""
        if not self._queue or places <= 0:
            return []
        oldest, near = self._queue[0], self._queue[1:LOOKAHEAD]
        # Places are kept for the oldest, but not while it could not use them.
        if len(oldest.lanes) > places and self._take(oldest):
            self.give_back(oldest)
            return []
        length = self._fresh(oldest)
        fresh = {id(request): self._fresh(request) for request in near} | {id(oldest): length}
        near.sort(key=lambda request: abs(fresh[id(request)] - length))
        chosen: list[InFlight] = []
        try:
            self._fill(chosen, [request for request in (oldest, *near) if not self._failed(request)], fresh, places)
        except BaseException:
            for request in chosen:
                self.give_back(request)
            raise
        gone = {id(request) for request in (*chosen, *(request for request, _ in self.failed))}
        self._queue = [request for request in self._queue if id(request) not in gone]
        return chosen

    def _failed(self, request: InFlight) -> bool:
        return any(failed is request for failed, _ in self.failed)

    def _fill(
        self, chosen: list[InFlight], requests: Sequence[InFlight], fresh: Mapping[int, int], places: int
    ) -> None:
        lanes = longest = 0
        for request in requests:
            widest = max(longest, fresh[id(request)])
            count = lanes + len(request.lanes)
            if count > places or (chosen and widest * count > PREFILL_TOKENS):
                continue
            if self._take(request):
                chosen.append(request)
                lanes, longest = count, widest
            if lanes == places:
                break

    def give_back(self, request: InFlight) -> None:
        """Ends the request's lease, if it has one."""
        lease, request.lease = request.lease, None
        if lease is not None:
            self._bank.release(lease)

    def _take(self, request: InFlight) -> bool:
        handles = request.handles
        if not handles:
            return True
        error: XpertError | None
        try:
            request.lease = self._bank.acquire(handles)
            if request.lease is not None:
                return True
            error = self._bank.failure(handles)
        except XpertError as refused:  # it fitted when it came, but pins have taken the room
            error = refused
        if error is not None:
            self.failed.append((request, error))
        return False
