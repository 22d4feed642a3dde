"""The server, as the real `openai` client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from xpert.experts.server.engine_loop import EngineLoop
from xpert.protocols import EngineRequest, Piece

CASING = [{"role": "user", "content": "Write the word in capitals.\n\nbaba (case 3 tite)"}]
SUM = [{"role": "user", "content": "Add the two numbers.\n\n3 + 4 (case 9 lodi)"}]


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pair", "me/casing", "me/sums", "base"]
    assert client.models.retrieve("me/sums").id == "me/sums"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'me/sums'"):
        client.models.retrieve("me/sum")


@pytest.mark.parametrize("model", ["pair", "me/casing", "base"])
def test_whole_and_streamed_answers_are_the_runners(client: openai.OpenAI, served: Any, model: str) -> None:
    expected = served.greedy(model, CASING[0]["content"], 12)
    options: Any = {"model": model, "messages": CASING, "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected
    assert whole.model == model and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_header_says_who_answers(client: openai.OpenAI) -> None:
    def who(model: str, messages: Any) -> str | None:
        raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=2)
        return raw.headers.get("x-xpert-experts")

    assert who("pair", CASING) == "me/casing=1"
    assert who("pair", SUM) == "me/sums=1"
    assert who("pair", [{"role": "user", "content": "¿Dónde está la biblioteca?"}]) == "base"
    assert who("me/sums", CASING) == "me/sums=1"
    assert who("base", CASING) == "base"


def test_stop_and_sampling(client: openai.OpenAI, served: Any) -> None:
    whole = served.greedy("base", SUM[0]["content"], 24)
    stop = whole[4:6]
    cut: Any = client.chat.completions.create(model="base", messages=SUM, max_tokens=24, stop=stop)  # type: ignore[call-overload]
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    options: Any = {"model": "base", "messages": SUM, "max_completion_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    drawn = [client.chat.completions.create(**options, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_content_parts_and_neutral_parameters(client: openai.OpenAI, served: Any) -> None:
    content = CASING[0]["content"]
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": content[:5]}, {"type": "text", "text": content[5:]}]}
    ]
    options: Any = {"presence_penalty": 0, "logprobs": False, "response_format": {"type": "text"}, "n": 1, "user": "me"}
    answer = client.chat.completions.create(model="me/casing", messages=parts, max_tokens=6, **options)
    assert answer.choices[0].message.content == served.greedy("me/casing", content, 6)


@pytest.mark.parametrize("stream", [False, True])
def test_eight_clients_share_the_batch(served: Any, stream: bool) -> None:
    models = ["pair", "me/casing", "me/sums", "base"] * 2
    expected = [served.greedy(model, CASING[0]["content"], 10) for model in models]

    async def ask(client: openai.AsyncOpenAI, model: str) -> str:
        options: Any = {"model": model, "messages": CASING, "max_tokens": 10}
        if not stream:
            return (await client.chat.completions.create(**options)).choices[0].message.content or ""
        chunks = await client.chat.completions.create(**options, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, model) for model in models))

    assert asyncio.run(ask_all()) == expected


def test_a_client_that_leaves_frees_its_place(served: Any) -> None:
    body = {"model": "base", "messages": SUM, "max_tokens": 400, "temperature": 2.0, "seed": 1, "stream": True}
    with httpx.Client() as client, client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json={**body, "stream": False}, timeout=0.05)
    for _ in range(500):
        if served.active() == 0:
            break
        time.sleep(0.01)
    assert served.active() == 0


@pytest.mark.parametrize(
    ("change", "error", "param", "message"),
    [
        ({"model": "me/casng"}, openai.NotFoundError, "model", "Did you mean 'me/casing'"),
        ({"messages": []}, openai.BadRequestError, "messages", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, openai.BadRequestError, "messages.0.content", "content"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "9"}, openai.BadRequestError, "max_tokens", "valid integer"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p", "top_p"),
        ({"n": 0}, openai.BadRequestError, "n", "greater than or equal to 1"),
        ({"n": 65}, openai.BadRequestError, "n", "65 replies are asked for at once; the most is 64"),
        ({"n": 60}, openai.BadRequestError, None, "takes 20 at a time"),
        ({"stop": ""}, openai.BadRequestError, "stop", "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "top_logprobs needs logprobs=true"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format.json_schema", "needs"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "Did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, openai.BadRequestError, None, "context holds"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes(
    client: openai.OpenAI,
    change: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    message: str,
    stream: bool,
) -> None:
    options: dict[str, Any] = {"model": "pair", "messages": CASING, "max_tokens": 4, **change}
    with pytest.raises(error, match=message) as caught:
        client.chat.completions.create(**options, stream=stream)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/route", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", "/v1/chat/completions", b" " * (9 << 20), 413),
        ("POST", "/v1/route", b"{}", 400),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
    ],
)
def test_every_error_has_openais_form(served: Any, method: str, path: str, content: bytes | None, status: int) -> None:
    response = httpx.request(method, served.url + path, content=content)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_route_page_and_description(served: Any) -> None:
    route = httpx.post(f"{served.url}/v1/route", json={"messages": CASING}).json()
    assert route["experts"] == [{"expert": "me/casing", "weight": 1.0}]
    assert len(route["candidates"]) == 2 and "nearest skill" in route["reason"]
    page = httpx.get(served.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text and "https://" not in page.text  # nothing is fetched from elsewhere
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert "requestBody" in paths["/v1/chat/completions"]["post"]


class _BrokenSession:
    def __init__(self, engine: _BrokenEngine) -> None:
        self.engine = engine
        self.waiting: list[EngineRequest] = []

    def submit(self, request: EngineRequest) -> None:
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        self.waiting = [request for request in self.waiting if request.id != request_id]

    @property
    def idle(self) -> bool:
        return not self.waiting

    def failures(self) -> list[Any]:
        return []

    def close(self) -> None:
        self.waiting = []

    def step(self) -> list[Piece]:
        if self.engine.broken:
            self.engine.broken = False
            raise RuntimeError("out of memory")
        done, self.waiting = self.waiting, []
        return [Piece(request.id, "fine", "stop", 1, 1) for request in done]


class _BrokenEngine:
    """Fails in its first step, and works in the session after."""

    def __init__(self) -> None:
        self.broken = True

    def session(self) -> _BrokenSession:
        return _BrokenSession(self)


def test_a_broken_step_fails_its_requests_and_the_loop_lives() -> None:
    loop = EngineLoop(_BrokenEngine())
    for expected in (RuntimeError, Piece):
        heard: list[Any] = []
        arrived = threading.Event()

        def sink(item: Any, heard: list[Any] = heard, arrived: threading.Event = arrived) -> None:
            heard.append(item)
            arrived.set()

        loop.submit(EngineRequest("a", (1,)), sink)
        assert arrived.wait(10)
        assert isinstance(heard[0], expected)
    loop.close()
    assert not loop.alive


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_mixture_file_is_served_by_the_command(mixture_file: Callable[..., Path], tmp_path: Path, sent: str) -> None:
    """`xpert serve` in a process of its own: says its address, answers at once, and ends by a signal with status 0."""
    import os
    import signal
    import subprocess
    import sys

    process = subprocess.Popen(
        [sys.executable, "-m", "xpert", "serve", str(mixture_file()), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XPERT_CACHE": str(tmp_path / "cache")},
    )
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model=said["model"], messages=CASING, max_tokens=3)
        assert answer.choices[0].message.content is not None
        process.send_signal(getattr(signal, sent))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "stopped serving" in errors


@pytest.mark.parametrize(("name", "value", "taken"), [("store", False, True), ("store", 0, False), ("n", 1.0, True)])
def test_neutral_values_are_those_of_their_type(served: Any, name: str, value: object, taken: bool) -> None:
    body = {"model": "base", "messages": SUM, "max_tokens": 1, name: value}
    assert (httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200) is taken


@pytest.mark.parametrize(
    ("path", "change", "status"),
    [
        ("/v1/route", {"model": ""}, 404),
        ("/v1/chat/completions", {"model": "", "max_tokens": 1}, 404),
        ("/v1/chat/completions", {"model": "base", "max_tokens": 1, "repetition_penalty": 5e-324}, 400),
        ("/v1/chat/completions", {"model": "base", "max_tokens": 1, "repetition_penalty": 0.01}, 200),
    ],
)
def test_values_at_the_edge(served: Any, path: str, change: dict[str, Any], status: int) -> None:
    assert httpx.post(f"{served.url}{path}", json={"messages": SUM, **change}).status_code == status
