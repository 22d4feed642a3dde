"""One thread runs the engine; requests of all clients enter its batch as they come and leave it as they end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xpert.errors import Unavailable
from xpert.protocols import EngineRequest, Piece

__all__ = ["Delivery", "EngineLoop", "Sink"]

log = logging.getLogger("xpert.server")

Sink = Callable[[Piece | Exception], None]
"""Hears the pieces of one request, in order; an exception is the last it hears."""


@dataclass(frozen=True)
class Delivery:
    """What one step said, and to whom; `began` is when the step did, by `time.monotonic`."""

    began: float
    heard: Sequence[tuple[Sink, Piece | Exception]]


class EngineLoop:
    """The engine's thread. `submit` and `cancel` may be called from any thread.

    `deliver` is called on the engine's thread, once a step with all that the step said: to wake an event loop once a
    step costs a fraction of waking it for every token. By default the sinks are called right there.
    """

    def __init__(self, engine: Any, deliver: Callable[[Delivery], None] | None = None) -> None:
        self._engine = engine
        self._deliver = deliver or _call_sinks
        self._session = engine.session()
        self._lock = threading.Lock()  # guards session, sinks and closed
        self._sinks: dict[str, Sink] = {}
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xpert-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def active(self) -> int:
        """Requests in the batch or waiting for it."""
        return len(self._sinks)

    @property
    def running(self) -> int:
        """Rows in the batch. An engine whose session does not say counts all its requests."""
        return int(getattr(self._session, "running", self.active))

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Hands the request to the engine, on the caller's thread: what it refuses is raised here.

        Raises Unavailable once the loop is closed. A request whose constraint has to be compiled takes its time.
        """
        while True:
            with self._lock:
                if self._closed or not self._thread.is_alive():
                    raise Unavailable("the server is shutting down")
                session = self._session
                self._sinks[request.id] = sink
            try:
                session.submit(request)
            except BaseException:
                with self._lock:
                    self._sinks.pop(request.id, None)
                raise
            with self._lock:
                taken = self._session is session
                told = request.id not in self._sinks  # that its session failed
            if not taken:
                session.close()  # once more: it came to a session that was closed
            if taken or told:
                break
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Frees the request's place in the batch; its sink hears nothing more."""
        with self._lock:
            known = self._sinks.pop(request_id, None) is not None
            session = self._session
        if known:
            session.cancel(request_id)
            self._wake.set()

    def close(self) -> None:
        """Ends the thread; what still runs hears Unavailable."""
        with self._lock:
            self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._closed:
                self._fail(Unavailable("the server is shutting down"))
                self._session.close()
                return
            if self._session.idle:
                self._wake.wait()
            else:
                self._step()

    def _step(self) -> None:
        began = time.monotonic()
        try:
            pieces = self._session.step()
            failures = self._session.failures()
        except Exception as error:
            # A step that broke leaves the batch in no known state: all its requests fail, and a new one begins.
            log.exception("a step of the engine failed")
            # The exchange and the taking of the sinks are one: who submits in between would be told of a failure that
            # is not its own, and its request would run on in the new session with nobody to hear it.
            with self._lock:
                broken, self._session = self._session, self._engine.session()
                sinks, self._sinks = self._sinks, {}
            self._tell(sinks, error)
            broken.close()
            return
        heard: list[tuple[Sink, Piece | Exception]] = []
        with self._lock:
            for piece in pieces:
                sink = self._sinks.get(piece.request_id)
                if piece.finished is not None:
                    self._sinks.pop(piece.request_id, None)
                if sink is not None:
                    heard.append((sink, piece))
            for request_id, failure in failures:
                failed = self._sinks.pop(request_id, None)
                if failed is not None:
                    heard.append((failed, failure))
        if heard:
            self._deliver(Delivery(began, heard))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            sinks, self._sinks = self._sinks, {}
        self._tell(sinks, error)

    def _tell(self, sinks: Mapping[str, Sink], error: Exception) -> None:
        if sinks:
            self._deliver(Delivery(time.monotonic(), [(sink, error) for sink in sinks.values()]))


def _call_sinks(said: Delivery) -> None:
    for sink, item in said.heard:
        sink(item)
