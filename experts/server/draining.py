"""An end in good order: no new requests, time for those that run, and a word to those that run too long.

    serving ──drain()──► not ready, nothing new let in ──all ended, or `grace` seconds──► the rest are told ──► stopped

`/readyz` answers 503 from the first moment on while `/healthz` stays as it is, so that a load balancer looks elsewhere
and nothing restarts a server that is ending as it should.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from xpert.errors import Unavailable, XpertError

__all__ = ["Draining", "DrainingServer", "Ended"]

log = logging.getLogger("xpert.server")

FAREWELL = 2.0
"""Seconds that requests get to send their last event once they were told to stop."""
_TICK = 0.05


@dataclass(frozen=True)
class Ended:
    """How many requests ended by themselves while the server was draining, how many were told to stop, and how many of
    those had not ended when it stopped waiting."""

    finished: int
    told: int
    left: int


class Draining:
    """Which requests run, and whether more may come. Belongs to one event loop."""

    def __init__(self) -> None:
        self._draining = False
        self._running: dict[int, Callable[[XpertError], None]] = {}
        self._next = 0

    @property
    def ready(self) -> bool:
        """What `/readyz` says: false from the first moment of the end."""
        return not self._draining

    @property
    def running(self) -> int:
        return len(self._running)

    @contextmanager
    def request(self, stop: Callable[[XpertError], None]) -> Iterator[None]:
        """Holds while a request runs, a streamed reply's sending included.

        `stop` is called on the event loop, at most once, if the request outlasts the grace period: it hands the error
        to whatever waits for the reply's pieces, which sends it as the last event or as the reply, and ends. Raises
        Unavailable where the server is ending already.
        """
        if self._draining:
            raise _stopping()
        number, self._next = self._next, self._next + 1
        self._running[number] = stop
        try:
            yield
        finally:
            del self._running[number]

    async def drain(self, grace: float, *, hurry: Callable[[], bool] = lambda: False) -> Ended:
        """Lets nothing new in, waits for what runs, and tells the rest to stop after `grace` seconds, or at once when
        `hurry` says so. Returns when nothing runs, or FAREWELL seconds after it told the rest."""
        self._draining = True
        before = set(self._running)
        if before:
            log.warning("stopping: running requests have %g s to end: %d", grace, len(before))
        await self._wait(grace, hurry)
        told = dict(self._running)
        for stop in told.values():
            try:
                stop(_stopping())
            except Exception:
                # Whatever one request makes of it, the others must hear it too.
                log.exception("a request could not be told to stop")
        if told:
            await self._wait(FAREWELL, hurry)
        ended = Ended(len(before) - len(told), len(told), self.running)
        if told:
            log.warning("requests that were told to stop: %d; that have not: %d", ended.told, ended.left)
        return ended

    async def _wait(self, seconds: float, hurry: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while self._running and not hurry() and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(_TICK, left))


class DrainingServer(uvicorn.Server):
    """Uvicorn that drains between the signal and closing its sockets: meanwhile /readyz is heard, and clients on kept
    connections get a 503 with a reason in place of a broken line. A second Ctrl-C ends the waiting, and the
    application still ends in good order: its logs are written, its spans sent."""

    def __init__(self, config: uvicorn.Config, draining: Draining, *, grace: float) -> None:
        super().__init__(config)
        self.draining = draining
        self.grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.draining.drain(self.grace, hurry=lambda: self.force_exit)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the application's own end out then, and prints a traceback
            await self.lifespan.shutdown()


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping", hint="send the request again")
