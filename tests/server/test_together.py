"""The parts in one small application, over real HTTP: what a client sees, and what the operator does."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from xpert.errors import XpertError
from xpert.experts.server.access_log import AccessLog, json_line
from xpert.experts.server.api_keys import ApiKeys, bearer
from xpert.experts.server.body import read_json
from xpert.experts.server.draining import Draining, DrainingServer
from xpert.experts.server.failures import Busy, Denied, Late, TooLarge, failure_headers
from xpert.experts.server.key_file import add_key, remove_key
from xpert.experts.server.limits import KeyLimits
from xpert.experts.server.metrics import Moment, ServerMetrics
from xpert.experts.server.request_watch import RequestWatch, facts_of, request_id_of
from xpert.experts.server.tracing import OpenTelemetry, http_attributes

SECRET = "the words of a prompt"


class _Holding(StreamingResponse):
    """Gives back what was taken for it, though the client may leave before the first piece is asked for."""

    def __init__(self, taken: ExitStack, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.taken = taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.taken:
            await super().__call__(scope, receive, send)


class Service:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.json"
        _, self.key = add_key(self.file, "ada", requests_per_minute=3, tokens_per_minute=1000, concurrent=1)
        self.keys, self.limits, self.draining = ApiKeys.read(self.file), KeyLimits(), Draining()
        self.lines, self.spans = io.StringIO(), InMemorySpanExporter()
        self.tracing = OpenTelemetry(self.spans)
        self.metrics = ServerMetrics(
            ["me/dates"], lambda: Moment(running=self.draining.running, ready=self.draining.ready)
        )
        self.app = FastAPI()
        self.app.add_exception_handler(XpertError, self.on_error)
        self.app.add_api_route("/chat", self.chat, methods=["POST"], response_model=None)
        self.app.add_api_route("/metrics", self.show_metrics, response_model=None)

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, XpertError)
        return JSONResponse({"error": str(error)}, error.http_status, headers=failure_headers(error))

    async def show_metrics(self, request: Request) -> Response:
        body, content_type = self.metrics.render(request.headers.get("accept"))
        return Response(body, media_type=content_type)

    async def chat(self, request: Request) -> Response:
        holder = self.keys.check(bearer(request.headers.get("authorization")))
        facts = facts_of(request.scope)
        facts.key_name = holder.name
        body = await read_json(request, most=2000, seconds=0.1)
        told: asyncio.Queue[XpertError] = asyncio.Queue()
        with ExitStack() as stack:
            stack.enter_context(
                self.tracing.request("POST /chat", request.scope["headers"], http_attributes("POST", "/chat"))
            )
            admission = stack.enter_context(self.limits.admit(holder, body["max_tokens"]))
            stack.enter_context(self.draining.request(told.put_nowait))
            taken = stack.pop_all()  # nothing was refused: the reply holds them from here on
        headers = {**self.limits.headers(holder), "x-experts": "me/dates"}
        facts.model, facts.model_kind, facts.experts = "pair", "mixture", ("me/dates",)

        async def events() -> AsyncIterator[str]:
            admission.used, facts.prompt_tokens, facts.completion_tokens = 30, 10, 20
            yield f"data: {request_id_of(request.scope)}\n\n"
            if body.get("long"):
                yield f"data: {await told.get()}\n\n"

        return _Holding(taken, events(), headers)


class Running:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.listener = socket.create_server(("127.0.0.1", 0))
        hear = [service.metrics.observe, AccessLog(service.lines, json_line)]
        config = uvicorn.Config(RequestWatch(service.app, hear), log_level="error", ws="none")
        self.server = DrainingServer(config, service.draining, grace=0.05)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {service.key}"})

    def ask(self, **body: object) -> httpx.Response:
        return self.client.post("/chat", json={"prompt": SECRET, "max_tokens": 100, **body})

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()
        self.service.tracing.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(Service(tmp_path))
    yield found
    found.close()


def test_a_day_of_a_server(running: Running) -> None:
    service = running.service
    first = running.ask()
    assert first.status_code == 200 and first.text == f"data: {first.headers['x-request-id']}\n\n"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-tokens"] == "900"
    second = running.ask(max_tokens=900)
    assert second.headers["x-ratelimit-remaining-tokens"] in (
        "70",
        "71",
        "72",
        "73",
    )  # 30 used, and a moment has passed
    assert running.ask(max_tokens=1001).status_code == 400
    running.ask()
    busy = running.ask()
    assert busy.status_code == 429 and 1 <= int(busy.headers["retry-after"]) <= 20
    assert 0 < int(busy.headers["retry-after-ms"]) <= 20_000
    denied = httpx.post(f"{running.url}/chat", json={})
    assert denied.status_code == 401 and denied.headers["www-authenticate"] == "Bearer"
    assert running.ask(prompt="x" * 4000).status_code == 413
    assert running.client.post("/chat", content=b"{").status_code == 400
    remove_key(service.file, "ada")
    assert running.ask().status_code == 401

    end = time.monotonic() + 10
    while service.lines.getvalue().count("\n") < 9 and time.monotonic() < end:  # the client hears a little earlier
        time.sleep(0.01)
    lines = [json.loads(line) for line in service.lines.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 200, 429, 401, 413, 400, 401]
    assert lines[0]["id"] == first.headers["x-request-id"] and lines[0]["completion_tokens"] == 20
    assert {line.get("key") for line in lines} == {"ada", None}
    assert SECRET not in service.lines.getvalue() and service.key not in service.lines.getvalue()
    scraped = running.client.get("/metrics").text
    assert 'xpert_requests_total{model_kind="mixture",route="/chat",status="200"} 3.0' in scraped
    assert 'xpert_expert_requests_total{expert="me/dates"} 3.0' in scraped
    assert "ada" not in scraped
    assert [span.name for span in service.spans.get_finished_spans()] == ["POST /chat"] * 5  # with two refused


def test_a_body_larger_than_allowed_is_answered_while_it_comes(running: Running) -> None:
    """Whether its length is told or not; the client hears 413 and not a broken connection."""

    def drip() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 1000

    assert running.client.post("/chat", content=b"x" * 20_000).status_code == 413
    assert running.client.post("/chat", content=drip()).status_code == 413


def test_a_slow_body_is_given_up(running: Running) -> None:
    with socket.create_connection(running.listener.getsockname()) as line:
        head = ("POST /chat HTTP/1.1", "host: x", f"authorization: Bearer {running.service.key}", "content-length: 9")
        line.sendall("\r\n".join((*head, "", "{")).encode())
        line.settimeout(5)
        answer = b"".join(iter(lambda: line.recv(1 << 16), b""))  # until the server closes the line
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer


def test_a_place_and_tokens_come_back_when_a_client_leaves(running: Running) -> None:
    with running.client.stream("POST", "/chat", json={"max_tokens": 800, "long": True}) as reply:
        lines = reply.iter_lines()  # kept, since the reply is closed with it
        assert next(lines).startswith("data: ")
        held = running.ask()
        assert held.status_code == 429 and "1 requests at a time" in held.text
    while "left" not in running.service.lines.getvalue():
        time.sleep(0.01)
    again = running.ask()
    assert again.status_code == 200 and int(again.headers["x-ratelimit-remaining-tokens"]) >= 870
    assert json.loads(running.service.lines.getvalue().splitlines()[1])["ended"] == "left"


def test_a_stop_in_the_middle_of_a_stream(running: Running) -> None:
    with running.client.stream("POST", "/chat", json={"max_tokens": 800, "long": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        running.server.should_exit = True
        assert "data: the server is stopping. Send the request again" in list(lines)
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (Busy("x", retry_after=1.2001), {"retry-after": "2", "retry-after-ms": "1201"}),
        (Busy("x", retry_after=0.0), {"retry-after": "1", "retry-after-ms": "1"}),
        (Denied("x"), {"www-authenticate": "Bearer"}),
        (TooLarge("x"), {"connection": "close"}),
        (Late("x"), {"connection": "close"}),
        (XpertError("x"), {}),
    ],
)
def test_what_a_refusal_says_in_headers(error: XpertError, headers: dict[str, str]) -> None:
    assert failure_headers(error) == headers
