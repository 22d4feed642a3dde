"""What is known of each request when it has ended: the one place that watches, for the access log and the metrics.

A plain ASGI middleware: it neither buffers a reply nor hides that a client has left, as Starlette's
`BaseHTTPMiddleware` would. It gives every request an id, which the handlers find in `scope["state"]["request_id"]` and
the client in the header `x-request-id`, and a `Facts`, in `scope["state"]["facts"]`, for the handlers to fill in.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CLIENT_LEFT", "Facts", "RequestWatch", "Seen", "facts_of", "request_id_of"]

log = logging.getLogger("xpert.server")

CLIENT_LEFT = 499
"""The status of a request whose client left before there was one; nginx's number."""
_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

ModelKind = Literal["mixture", "expert", "base", "none"]


@dataclass(slots=True)
class Facts:
    """What only the handlers know of a request. Never a prompt, a reply or a key.

    Times in seconds: `queue_seconds` waiting for the engine, `first_token_seconds` from the request's arrival to the
    first text, `token_seconds` from the first text to the last.
    """

    key_name: str | None = None
    model: str | None = None
    model_kind: ModelKind = "none"
    experts: Sequence[str] = ()
    fell_back: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None


@dataclass(slots=True)
class Seen:
    """A request that has ended. `time` is when it came, seconds since 1970; `seconds` how long it took, and
    `ttfb_seconds` until the first byte of the reply's body, if there was one; `route` the path's pattern, such as
    `/v1/models/{model:path}`, or None where none fits.

    ended: `whole`; `left`: the client went first; `failed`: the reply broke off.
    """

    time: float
    id: str
    client: str
    method: str
    path: str
    route: str | None = None
    status: int = 0
    seconds: float = 0.0
    ttfb_seconds: float | None = None
    bytes: int = 0
    ended: Literal["whole", "left", "failed"] = "whole"
    facts: Facts = field(default_factory=Facts)


Hear = Callable[[Seen], None]


class RequestWatch:
    """Calls each of `hear` once per HTTP request, after its end. What they raise is logged and harms no request."""

    def __init__(self, app: ASGIApp, hear: Sequence[Hear] = ()) -> None:
        self.app = app
        self._hear = tuple(hear)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        client = scope.get("client")
        seen = Seen(time.time(), _request_id(scope), client[0] if client else "-", scope["method"], scope["path"])
        state = scope.setdefault("state", {})
        state["request_id"], state["facts"] = seen.id, seen.facts
        own_header = (b"x-request-id", seen.id.encode())
        complete = left = False

        async def watched_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, own_header]}
            elif message["type"] == "http.response.body":
                size = len(message.get("body", b""))
                if size and seen.ttfb_seconds is None:
                    seen.ttfb_seconds = time.perf_counter() - begun
                seen.bytes += size
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            seen.seconds = time.perf_counter() - begun
            seen.route = getattr(scope.get("route"), "path", None)
            if not complete:
                seen.ended = "left" if left else "failed"
            if not seen.status or (left and not complete and not seen.bytes):
                seen.status = CLIENT_LEFT if left else 500
            self._tell(seen)

    def _tell(self, seen: Seen) -> None:
        for hear in self._hear:
            try:
                hear(seen)
            except Exception:
                # A full disk under the log, say: the request itself was served, and the others must hear of it too.
                log.exception("a request that has ended could not be noted")


def facts_of(scope: Scope) -> Facts:
    """The facts to fill in; where nobody watches they go nowhere."""
    found = scope.setdefault("state", {}).setdefault("facts", Facts())
    assert isinstance(found, Facts)
    return found


def request_id_of(scope: Scope) -> str:
    """The request's id; where nobody watches, one is made."""
    found = scope.setdefault("state", {}).setdefault("request_id", None) or _request_id(scope)
    scope["state"]["request_id"] = found
    return str(found)


def _request_id(scope: Scope) -> str:
    """The one that the client sent, if it is harmless: it goes into logs and headers."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex
