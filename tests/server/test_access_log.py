"""Watching requests, and the lines that come of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from xpert.experts.server.access_log import AccessLog, json_line, text_line
from xpert.experts.server.request_watch import Facts, RequestWatch, Seen, facts_of, request_id_of

Ask = Callable[..., Any]
SECRET = "xp-secret"


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return Response(name, headers={"x-request-id": "the handler's own"})

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        await request.body()
        facts = facts_of(request.scope)
        facts.key_name, facts.model, facts.experts = "ada", "pair", ("me/dates", "me/sums")
        facts.prompt_tokens, facts.completion_tokens = 12, 3
        return JSONResponse({"id": request_id_of(request.scope)})

    @app.get("/stream")
    async def stream() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"data: x\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces())

    @app.get("/broken")
    async def broken() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"data: x\n\n"
            raise RuntimeError("broken")

        return StreamingResponse(pieces())

    @app.get("/defect")
    async def defect() -> Response:
        raise RuntimeError("defect")

    return app


@pytest.fixture
def seen() -> list[Seen]:
    return []


@pytest.fixture
def app(seen: list[Seen]) -> RequestWatch:
    return RequestWatch(application(), [seen.append])


def test_a_request_is_noted_once_with_its_facts(app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    reply = ask(app, method="POST", path="/chat", chunks=[b"prom", b"ptly"], headers=[("authorization", SECRET)])
    (it,) = seen
    assert json.loads(reply.body) == {"id": it.id} and dict(reply.headers)["x-request-id"] == it.id
    assert (it.client, it.method, it.path, it.route, it.status) == ("192.0.2.7", "POST", "/chat", "/chat", 200)
    assert (it.ended, it.bytes) == ("whole", len(reply.body))
    assert it.ttfb_seconds is not None and 0 < it.ttfb_seconds <= it.seconds
    assert it.facts == Facts("ada", "pair", "none", ("me/dates", "me/sums"), False, 12, 3)
    for line in (json_line(it), text_line(it)):
        assert "promptly" not in line and SECRET not in line


def test_the_two_forms(seen: list[Seen]) -> None:
    facts = Facts("ada", "pair", "mixture", ("me/dates", "me/sums"), False, 12, 3)
    it = Seen(1767225600.25, "abc", "192.0.2.7", "POST", "/chat", "/chat", 200, 0.12345, 0.01, 44, "whole", facts)
    assert json.loads(json_line(it)) == {
        "time": "2026-01-01T00:00:00.250Z",
        "id": "abc",
        "client": "192.0.2.7",
        "method": "POST",
        "path": "/chat",
        "status": 200,
        "ended": "whole",
        "seconds": 0.1235,
        "ttfb_seconds": 0.01,
        "bytes": 44,
        "key": "ada",
        "model": "pair",
        "experts": "me/dates,me/sums",
        "prompt_tokens": 12,
        "completion_tokens": 3,
    }
    assert text_line(it) == (
        "2026-01-01T00:00:00.250Z 192.0.2.7 POST /chat 200 id=abc ended=whole seconds=0.1235 ttfb_seconds=0.01 "
        "bytes=44 key=ada model=pair experts=me/dates,me/sums prompt_tokens=12 completion_tokens=3"
    )
    bare = Seen(0.0, "abc", "-", "GET", "/")
    assert not {"key", "model", "experts", "ttfb_seconds"} & set(json.loads(json_line(bare)))


def test_a_route_is_its_pattern(app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    ask(app, path="/models/me/dates")
    ask(app, path="/nowhere")
    assert [(it.route, it.status) for it in seen] == [("/models/{name:path}", 200), (None, 404)]


@pytest.mark.parametrize("id", ["a", "A-b_c.9", "x" * 128])
def test_an_id_that_the_client_sent_is_kept(id: str, app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    reply = ask(app, path="/models/m", headers=[("X-Request-Id", id)])
    assert seen[0].id == id
    assert [value for name, value in reply.headers if name == "x-request-id"] == [id]


@pytest.mark.parametrize("id", ["", "x" * 129, "a b", "a\r\nset-cookie: x", "a\n", "é", "a/b", '"', "\x1b[2J"])
def test_an_id_that_could_do_harm_is_replaced(id: str, app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    reply = ask(app, path="/models/m", headers=[("x-request-id", id)])
    assert re.fullmatch("[0-9a-f]{32}", seen[0].id)
    assert [value for name, value in reply.headers if name == "x-request-id"] == [seen[0].id]
    ask(app, path="/models/m")
    assert seen[1].id != seen[0].id


def test_a_streamed_reply_is_passed_on_piece_by_piece(app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    reply = ask(app, path="/stream")
    assert [m.get("body") for m in reply.messages[1:4]] == [b"data: x\n\n"] * 3
    assert seen[0].ended == "whole" and seen[0].bytes == 27
    assert seen[0].ttfb_seconds is not None and seen[0].ttfb_seconds < seen[0].seconds


def test_a_client_that_leaves_is_noted(app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    ask(app, path="/stream", leave_after=2)
    assert (seen[0].ended, seen[0].status) == ("left", 200)
    assert seen[0].bytes < 27


def test_a_client_that_leaves_before_there_is_a_status(seen: list[Seen], ask: Ask) -> None:
    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    ask(RequestWatch(waiting, [seen.append]), leave_after=0)
    assert (seen[0].ended, seen[0].status) == ("left", 499)


def test_what_breaks_is_noted_and_raised_on(app: RequestWatch, seen: list[Seen], ask: Ask) -> None:
    assert isinstance(ask(app, path="/defect").raised, RuntimeError)
    assert ask(app, path="/broken").raised is not None
    assert [(it.status, it.ended) for it in seen] == [(500, "whole"), (200, "failed")]


def test_what_breaks_under_an_inner_watch_is_a_500(seen: list[Seen], ask: Ask) -> None:
    inside = application()
    inside.add_middleware(RequestWatch, hear=[seen.append])  # the 500 is then made outside of it
    assert ask(inside, path="/defect").status == 500
    assert (seen[0].status, seen[0].ended, seen[0].route) == (500, "failed", "/defect")


def test_a_request_that_is_cancelled_is_noted(
    app: RequestWatch, seen: list[Seen], exchange: Callable[..., Any]
) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(exchange(app, path="/stream"))
        await asyncio.sleep(0.015)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert seen[0].ended == "failed" and seen[0].bytes > 0


def test_what_cannot_be_noted_harms_no_request(ask: Ask, caplog: pytest.LogCaptureFixture, seen: list[Seen]) -> None:
    def broken(it: Seen) -> None:
        raise OSError("no space left")

    with caplog.at_level(logging.ERROR, "xpert.server"):
        reply = ask(RequestWatch(application(), [broken, seen.append]), path="/models/m")
    assert reply.status == 200 and len(seen) == 1 and "could not be noted" in caplog.text


def test_a_stream_that_breaks_loses_lines_only() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, json_line)
    log(Seen(0.0, "a", "-", "GET", "/"))
    assert stream.getvalue().endswith("}\n") and log.lost == 0
    stream.close()
    log(Seen(0.0, "b", "-", "GET", "/"))
    assert log.lost == 1


def test_only_requests_are_watched(seen: list[Seen]) -> None:
    kinds = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kinds.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        asyncio.run(RequestWatch(app, [seen.append])({"type": kind}, None, None))
    assert kinds == ["lifespan", "websocket"] and not seen


def test_facts_without_a_watch_go_nowhere() -> None:
    scope: dict[str, Any] = {"type": "http", "headers": []}
    facts_of(scope).model = "pair"
    assert facts_of(scope).model == "pair"
    assert request_id_of(scope) == request_id_of(scope) != ""


HOSTILE = st.text(max_size=60)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_request_can_feign_a_line(method: str, path: str, model: str) -> None:
    it = Seen(0.0, "abc", "192.0.2.7", method, path, facts=Facts(model=model, experts=(model,)))
    for form in (json_line, text_line):
        line = form(it)
        assert line.isascii() and line.isprintable()
    assert json.loads(json_line(it))["path"] == path
    words = re.findall(r'(?:[a-z_]+=)?(?:"(?:[^"\\]|\\.)*"|[^\s"]+)', text_line(it))
    assert [word.partition("=")[0] for word in words[5:]] == ["id", "ended", "seconds", "bytes", "model", "experts"]
    assert " ".join(words) == text_line(it)


def test_a_long_path_or_model_is_cut() -> None:
    it = Seen(0.0, "abc", "192.0.2.7", "GET", "/" + "x" * 9999, facts=Facts(model="m" * 9999))
    assert len(json_line(it)) < 800 and len(text_line(it)) < 800


def test_log_injection_by_a_path(seen: list[Seen], ask: Ask) -> None:
    stream = io.StringIO()
    app = RequestWatch(application(), [AccessLog(stream, text_line)])
    ask(app, path='/a\n2026-01-01T00:00:00.000Z 192.0.2.9 GET /admin 200\x1b[2J"')
    assert len(stream.getvalue().splitlines()) == 1 and "\x1b" not in stream.getvalue()
