"""Answering a stream of requests with a session: what every engine's `generate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from xpert.errors import XpertError
from xpert.protocols import EngineRequest, Piece

__all__ = ["drive"]


class Session(Protocol):
    """The part of an engine's session that is needed here."""

    @property
    def pending(self) -> frozenset[str]: ...

    @property
    def idle(self) -> bool: ...

    def submit(self, request: EngineRequest) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[Piece]: ...

    def failures(self) -> list[tuple[str, XpertError]]: ...

    def close(self) -> None: ...


def drive(
    session: Session,
    requests: Iterable[EngineRequest],
    *,
    read_ahead: int,
    cancelled: Callable[[str], bool] | None = None,
) -> Iterator[Piece]:
    """Pieces of all replies as they come; at most `read_ahead` requests are taken from `requests` before they end.

    `cancelled(id)` is asked before every step. Raises the first failure; the session is closed in any case.
    """
    source = iter(requests)
    more = True
    try:
        while more or not session.idle:
            while more and len(session.pending) < read_ahead:
                request = next(source, None)
                if request is None:
                    more = False
                else:
                    session.submit(request)
            if cancelled is not None:
                for request_id in session.pending:
                    if cancelled(request_id):
                        session.cancel(request_id)
            yield from session.step()
            for _, error in session.failures():
                raise error
    finally:
        session.close()
