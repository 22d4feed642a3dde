"""The server, as the real `openai` client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from xpert.experts.mixture import open_expert
from xpert.experts.server.app import create_app
from xpert.experts.server.engine_loop import EngineLoop
from xpert.experts.serving import MixtureRunner
from xpert.protocols import EngineRequest, Piece, Sampling
from xpert.records import Message, Row

CASING = [{"role": "user", "content": "Write the word in capitals.\n\nbaba (case 3 tite)"}]
SUM = [{"role": "user", "content": "Add the two numbers.\n\n3 + 4 (case 9 lodi)"}]


class Served:
    """A server on a port of its own, and the runner behind it."""

    def __init__(self, runner: MixtureRunner) -> None:
        self.runner = runner
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(runner), log_level="warning", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()

    def active(self) -> int:
        return int(httpx.get(f"{self.url}/healthz").json()["active"])

    def greedy(self, model: str, content: str, max_tokens: int) -> str:
        """What the runner answers without the server."""
        experts = self.runner.experts_of_model(model)
        row = Row("x", (Message("user", content),), "")
        if experts is None:
            return self.runner.answer([row], Sampling(max_tokens=max_tokens))[0].output
        request = self.runner.engine_request("x", row.messages, experts, Sampling(max_tokens=max_tokens))
        return "".join(piece.text for piece in self.runner.engine.generate([request]))


@pytest.fixture(scope="module")
def served(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path_factory: Any) -> Iterator[Served]:
    from xpert.experts.mixture import assemble
    from xpert.language_model import model_fingerprint
    from xpert.registry.card import BaseModel, ExpertCard

    base = BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")
    experts = []
    texts = {"casing": "Write the word in capitals.\n\n{} (case {} tite)", "sums": "Add the two numbers.\n\n{} + {}"}
    for seed, (skill, text) in enumerate(texts.items(), 1):
        folder = make_adapter(seed=seed)
        lines = [{"prompt": text.format(7 * i + 3, i), "skill": skill, "kind": "shot"} for i in range(12)]
        (folder / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ExpertCard(base=base, adapter={}, name=f"me/{skill}", skills=(skill,)).write(folder)
        experts.append(open_expert(folder))
    mixture = assemble(experts, router="centroid", router_params={"reject": 0.0}, name="pair")
    served = Served(MixtureRunner.open(mixture, max_batch=4))
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pair", "me/casing", "me/sums", "base"]
    assert client.models.retrieve("me/sums").id == "me/sums"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'me/sums'"):
        client.models.retrieve("me/sum")


@pytest.mark.parametrize("model", ["pair", "me/casing", "base"])
def test_whole_and_streamed_answers_are_the_runners(client: openai.OpenAI, served: Served, model: str) -> None:
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


def test_stop_and_sampling(client: openai.OpenAI, served: Served) -> None:
    whole = served.greedy("base", SUM[0]["content"], 24)
    stop = whole[4:6]
    cut: Any = client.chat.completions.create(model="base", messages=SUM, max_tokens=24, stop=stop)  # type: ignore[call-overload]
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    options: Any = {"model": "base", "messages": SUM, "max_completion_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    drawn = [client.chat.completions.create(**options, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_content_parts_and_neutral_parameters(client: openai.OpenAI, served: Served) -> None:
    content = CASING[0]["content"]
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": content[:5]}, {"type": "text", "text": content[5:]}]}
    ]
    options: Any = {"presence_penalty": 0, "logprobs": False, "response_format": {"type": "text"}, "n": 1, "user": "me"}
    answer = client.chat.completions.create(model="me/casing", messages=parts, max_tokens=6, **options)
    assert answer.choices[0].message.content == served.greedy("me/casing", content, 6)


@pytest.mark.parametrize("stream", [False, True])
def test_eight_clients_share_the_batch(served: Served, stream: bool) -> None:
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


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
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
        ({"n": 2}, openai.BadRequestError, "n", "n=2 is not supported"),
        ({"stop": ""}, openai.BadRequestError, "stop", "stop"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "'logprobs' is not supported"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "not supported"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "Did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, None, "context holds"),
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
def test_every_error_has_openais_form(
    served: Served, method: str, path: str, content: bytes | None, status: int
) -> None:
    response = httpx.request(method, served.url + path, content=content)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_route_page_and_description(served: Served) -> None:
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


def test_a_mixture_file_is_served_by_the_command(mixture_file: Callable[..., Path], tmp_path: Path) -> None:
    """`xpert serve` in a process of its own: says its address, answers, and ends by Ctrl-C with status 0."""
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
        with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="none", max_retries=5) as client:
            answer = client.chat.completions.create(model=said["model"], messages=CASING, max_tokens=3)
        assert answer.choices[0].message.content is not None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "stopped serving" in errors
