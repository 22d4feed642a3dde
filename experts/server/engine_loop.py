"""One thread runs the engine; requests of all clients enter its batch as they come and leave it as they end."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from xpert.errors import Unavailable, XpertError
from xpert.protocols import EngineRequest, Piece

__all__ = ["EngineLoop", "Sink"]

log = logging.getLogger("xpert.server")

Sink = Callable[[Piece | Exception], None]
"""Hears the pieces of one request, in order, on the engine's thread; an exception is the last it hears."""


class EngineLoop:
    """The engine's thread. `submit` and `cancel` may be called from any thread and return at once."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._session = engine.session()
        self._inbox: queue.SimpleQueue[tuple[str, EngineRequest | str | None, Sink | None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="xpert-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def active(self) -> int:
        """Requests in the batch or waiting for it."""
        return len(self._sinks) + self._inbox.qsize()

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        if not self.alive:
            raise Unavailable("the server is shutting down")
        self._inbox.put(("submit", request, sink))

    def cancel(self, request_id: str) -> None:
        """Frees the request's place in the batch; its sink hears nothing more."""
        self._inbox.put(("cancel", request_id, None))

    def close(self) -> None:
        """Ends the thread; what still runs hears Unavailable."""
        self._closed = True
        self._inbox.put(("close", None, None))
        self._thread.join()

    def _run(self) -> None:
        while True:
            while not self._sinks or not self._inbox.empty():
                if not self._take(*self._inbox.get()):
                    self._fail(Unavailable("the server is shutting down"))
                    self._session.close()
                    return
            self._step()

    def _take(self, what: str, subject: EngineRequest | str | None, sink: Sink | None) -> bool:
        """Handles one message; False ends the thread."""
        if isinstance(subject, EngineRequest):
            assert sink is not None
            try:
                self._session.submit(subject)
                self._sinks[subject.id] = sink
            except XpertError as error:
                sink(error)
            except Exception as error:
                log.exception("the engine failed to take a request")
                sink(error)
        elif isinstance(subject, str) and self._sinks.pop(subject, None) is not None:
            self._session.cancel(subject)
        return what != "close"

    def _step(self) -> None:
        try:
            pieces = self._session.step()
        except Exception as error:
            # A step that broke leaves the batch in no known state: all its requests fail, and a new one begins.
            log.exception("a step of the engine failed")
            self._fail(error)
            self._session.close()
            self._session = self._engine.session()
            return
        for piece in pieces:
            sink = self._sinks.get(piece.request_id)
            if piece.finished is not None:
                self._sinks.pop(piece.request_id, None)
            if sink is not None:
                sink(piece)
        for request_id, failure in self._session.failures():
            failed = self._sinks.pop(request_id, None)
            if failed is not None:
                failed(failure)

    def _fail(self, error: Exception) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(error)
