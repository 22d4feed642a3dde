"""A client that speaks ASGI itself: it can send a body slowly, leave, and see every message of a reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]


@dataclass
class Exchange:
    """What an application made of one request; `raised` is what left it."""

    messages: list[Message] = field(default_factory=list)
    raised: BaseException | None = None
    scope: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.messages if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> list[tuple[str, str]]:
        starts = [m for m in self.messages if m["type"] == "http.response.start"]
        return [(name.decode(), value.decode()) for start in starts for name, value in start["headers"]]

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] == "http.response.body")


async def _exchange(
    app: Application,
    *,
    method: str = "GET",
    path: str = "/",
    headers: Iterable[tuple[str, str]] = (),
    chunks: Iterable[bytes] = (b"",),
    pause: float = 0.0,
    leave_after: int | None = None,
    ever: bool = False,
) -> Exchange:
    """Sends `chunks` with a pause before each (`ever`: more never comes), and leaves once `leave_after` messages of the
    reply have come. A client that has not left is still there when the reply has ended."""
    found = Exchange()
    found.scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("192.0.2.7", 4711),
        "server": ("testserver", 80),
        "state": {},
    }
    parts = list(chunks)
    left = asyncio.Event()
    if leave_after == 0:
        left.set()

    async def receive() -> Message:
        if parts:
            await asyncio.sleep(pause)
            body = parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(parts) or ever}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        found.messages.append(message)
        if leave_after is not None and len(found.messages) >= leave_after:
            left.set()
        await asyncio.sleep(0)

    try:
        await app(found.scope, receive, send)
    except Exception as error:  # a test asks what it was
        found.raised = error
    return found


@pytest.fixture
def ask() -> Callable[..., Exchange]:
    """`exchange`, run to its end on a loop of its own."""

    def run(app: Application, **options: Any) -> Exchange:
        return asyncio.run(_exchange(app, **options))

    return run


@pytest.fixture
def exchange() -> Callable[..., Awaitable[Exchange]]:
    """One request to an application, on the running loop."""
    return _exchange
