"""Responses whose clients may leave, be slow, or come too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xpert.experts.server.calls import Call
from xpert.experts.server.failures import Late

__all__ = ["ClientGone", "EventStream", "merged", "until_gone", "with_first"]

T = TypeVar("T")
LAST_WORD = 1.0
"""Seconds that an error event gets to leave, once the deadline has passed."""


class ClientGone(Exception):
    """The client has left; nobody reads an answer."""


class EventStream(Response):
    """Server-sent events of a call, whose resources are let go once the last event is out, the client has left, the
    deadline has passed, or the server wants an end.

    `last_word(error)` makes the event that ends a stream which fails after its status went out.
    """

    def __init__(
        self,
        call: Call,
        events: AsyncGenerator[str, None],
        *,
        headers: Mapping[str, str],
        last_word: Callable[[Exception], str],
    ) -> None:
        super().__init__(None, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        self._call, self._events, self._last_word = call, events, last_word

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._call.resources:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            failure = await self._pour(receive, send)
            if failure is not None:
                self._call.failure = failure
            if isinstance(failure, ClientGone):
                return
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(LAST_WORD):
                    if failure is not None:
                        word = self._last_word(failure).encode()
                        await send({"type": "http.response.body", "body": word, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pour(self, receive: Receive, send: Send) -> Exception | None:
        """Sends the events; what kept it from sending all of them."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_gone(receive))
        waits: list[asyncio.Future[Any]] = [sending, leaving, self._call.stop]
        late = False
        try:
            async with asyncio.timeout_at(self._call.deadline):
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            late = True
        finally:
            whole = sending.done()
            sending.cancel()
            leaving.cancel()
            found = await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
        if whole:
            error = found[0]
            # An OSError is a client that left while it was written to.
            return ClientGone() if isinstance(error, OSError) else error if isinstance(error, Exception) else None
        if late:
            return Late("the request's deadline passed before its answer was whole")
        return self._call.stop.result() if self._call.stop.done() else ClientGone()

    async def _send(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})


async def until_gone(request: Request, call: Call, work: Awaitable[T]) -> T:
    """What `work` gives. Raises ClientGone once the client has left, Late after the deadline, and what the server says
    when it wants an end; each of these ends the work."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    waits: list[asyncio.Future[Any]] = [working, leaving, call.stop]
    try:
        async with asyncio.timeout_at(call.deadline):
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise call.stop.result() if call.stop.done() else ClientGone
        return working.result()
    except TimeoutError:
        if working.done() and not working.cancelled():
            return working.result()
        raise Late("the request's deadline passed before its answer was whole") from None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the source, item) as they come, until all have ended. The first error ends all, and so does closing."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def pump(index: int, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                arrived.put_nowait((index, item))
            arrived.put_nowait(None)
        except Exception as error:
            # It is raised below, where the items are read.
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(index, source)) for index, source in enumerate(sources)]
    try:
        ended = 0
        while ended < len(tasks):
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                ended += 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def with_first(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """`first`, then the rest of the generator it was taken from, which is closed with this one."""
    try:
        yield first
        async for item in rest:
            yield item
    finally:
        await rest.aclose()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
