"""Whoever leaves, wherever it is on its way, leaves nothing behind: no place, no row in the batch, no generation."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.serving.leaving import opened, until
from xpert.config import Config
from xpert.errors import Unavailable
from xpert.experts.server.batcher import Batcher
from xpert.experts.server.engine_loop import EngineLoop
from xpert.experts.server.replies import Prompt, Speaker, Task
from xpert.experts.server.streams import merged
from xpert.protocols import (
    Answer,
    Ask,
    Constraint,
    EngineRequest,
    Escalation,
    Piece,
    Question,
    Route,
    RouteRequest,
    Sampling,
    Verdict,
    Weigh,
    Weighed,
)

PROMPT = [{"role": "user", "content": "go on"}]


class _Session:
    """Takes requests once `open` is set, and never says anything."""

    def __init__(self, opened: threading.Event) -> None:
        self.opened = opened
        self.entered, self.taken = threading.Event(), threading.Event()
        self.ids: set[str] = set()
        self.closed = 0

    def submit(self, request: EngineRequest) -> None:
        self.entered.set()
        assert self.opened.wait(20)
        self.ids.add(request.id)
        self.taken.set()

    def cancel(self, id: str) -> None:
        self.ids.discard(id)

    @property
    def idle(self) -> bool:
        return True

    def step(self) -> list[Piece]:
        return []

    def failures(self) -> list[Any]:
        return []

    def close(self) -> None:
        self.closed += 1


def test_leaving_while_a_grammar_is_compiled_takes_the_request_out_again() -> None:
    opened = threading.Event()
    session = _Session(opened)
    request = EngineRequest("r", (1, 2), (), Sampling(), constraint=Constraint("json"))

    async def run() -> None:
        speaker = Speaker(SimpleNamespace(session=lambda: session), None, max_batch=1)
        task = Task("r", None, Prompt(()), Route((), (), ""), False, Sampling(), request=request)  # type: ignore[arg-type]  # no generation is needed
        waiting = asyncio.ensure_future(anext(speaker.pieces(task)))
        await asyncio.to_thread(session.entered.wait, 20)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        opened.set()
        await asyncio.to_thread(session.taken.wait, 20)
        while session.ids or speaker.loop.active:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(speaker.close)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("count", [1, 2])
def test_a_merged_stream_that_is_closed_closes_its_sources_at_once(count: int) -> None:
    closed: list[int] = []

    async def source(number: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                await asyncio.sleep(0)
                yield number
        finally:
            closed.append(number)

    async def run() -> None:
        stream = merged([source(number) for number in range(count)])
        await anext(stream)
        await stream.aclose()
        assert sorted(closed) == list(range(count))

    asyncio.run(run())


class _HookedLock:
    """A lock that calls `hook` once, the first time it is free and `due()`."""

    def __init__(self, due: Callable[[], bool], hook: Callable[[], None]) -> None:
        self._lock, self._due, self._hook = threading.Lock(), due, hook
        self._called = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if not self._called and self._due():
            self._called = True
            self._hook()


def test_a_request_that_comes_right_after_a_session_broke_is_not_told_of_it() -> None:
    opened = threading.Event()
    opened.set()

    class Breaking(_Session):
        @property
        def idle(self) -> bool:
            return not self.ids

        def step(self) -> list[Piece]:
            raise RuntimeError("broken")

    class Quiet(_Session):
        pass

    sessions: list[_Session] = [Breaking(opened), Quiet(opened)]
    made = iter(sessions)
    loop = EngineLoop(SimpleNamespace(session=lambda: next(made)))
    told: dict[str, Piece | Exception] = {}

    def submit(id: str) -> None:
        loop.submit(EngineRequest(id, (1,), (), Sampling()), lambda item: told.setdefault(id, item))

    loop._lock = _HookedLock(lambda: loop._session is sessions[1], lambda: submit("second"))  # type: ignore[assignment]
    submit("first")
    until(lambda: "first" in told)
    until(lambda: sessions[0].closed > 0)
    assert isinstance(told["first"], RuntimeError)
    assert "second" not in told
    assert sessions[1].ids == {"second"}
    assert loop.active == 1
    loop.close()
    assert "shutting down" in str(told["second"])


def test_who_waits_for_a_batch_hears_that_the_server_ends() -> None:
    let_go, begun = threading.Event(), threading.Event()

    def work(items: Sequence[int]) -> Sequence[int]:
        begun.set()
        assert let_go.wait(20)
        return items

    async def run() -> None:
        executor = ThreadPoolExecutor(1)
        busy = asyncio.get_running_loop().run_in_executor(executor, work, [])
        batcher = Batcher(work, executor, 1)
        waiting = [asyncio.ensure_future(batcher(number)) for number in range(3)]
        await asyncio.to_thread(begun.wait, 20)
        executor.shutdown(wait=False, cancel_futures=True)
        let_go.set()
        await busy
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert [type(one) for one in found] == [Unavailable] * 3

    asyncio.run(run())


class _Cascade:
    """Both stages of every route are of experts, and the first is never sure enough."""

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        second = Escalation((("me/sums", 1.0),), 1.1)
        return [Route((("me/casing", 1.0),), (), "cascade", second) for _ in requests]


class _TwoSteps:
    """Asks one expert for a word, and then both for long."""

    Options = Config

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        yield [Ask(question.messages, (("me/casing", 1.0),), Sampling(max_tokens=1))]
        yield [Ask(question.messages, ((key, 1.0),), question.sampling) for key in ("me/casing", "me/sums")]
        raise AssertionError("it was not to get so far")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "late"),
    [({"router": _Cascade()}, 1), ({"aggregator": _TwoSteps()}, 2)],
    ids=["second stage", "second step"],
)
def test_leaving_late_in_a_reply_of_several_stages_leaves_nothing(
    served: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], late: int, stream: bool
) -> None:
    current, service = served.generations.current, served.app.state.service
    monkeypatch.setattr(current, "routed", dataclasses.replace(current.routed, **change))
    submitted: list[str] = []
    plain = service.speaker.loop.submit

    def submit(request: EngineRequest, sink: Any) -> None:
        submitted.append(request.id)
        if len(submitted) > 1 and "router" in change:  # the second stage is as long as its sampling says
            request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=400))
        plain(request, sink)

    monkeypatch.setattr(service.speaker.loop, "submit", submit)
    body = {"model": "pair", "messages": PROMPT, "stream": stream, "max_tokens": 3 if "router" in change else 400}
    connection = opened(served.url, body)
    until(lambda: len(submitted) == 1 + late)
    connection.close()
    until(lambda: served.active() == 0, 5)
    until(lambda: service.admission.used == 0 and current.uses == 0, 5)
    assert len(submitted) == 1 + late


@pytest.fixture
def stuck(served: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A router that says nothing until it is let go."""
    let_go = threading.Event()

    class Stuck:
        def route(self, requests: list[RouteRequest]) -> list[Route]:
            let_go.wait(20)
            return [Route((), (), "at last") for _ in requests]

    current = served.generations.current
    monkeypatch.setattr(current, "routed", dataclasses.replace(current.routed, router=Stuck()))
    yield served
    let_go.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_holds_while_a_prompt_is_routed(stuck: Any, stream: bool) -> None:
    body = {"model": "pair", "messages": PROMPT, "stream": stream}
    reply = httpx.post(f"{stuck.url}/v1/chat/completions", json=body, headers={"x-xpert-timeout": "0.1"}, timeout=10)
    assert reply.status_code == 408
    assert stuck.app.state.service.admission.used == 0
    assert stuck.generations.current.uses == 0


def test_a_route_has_a_deadline_too(stuck: Any) -> None:
    body = {"messages": PROMPT}
    reply = httpx.post(f"{stuck.url}/v1/route", json=body, headers={"x-xpert-timeout": "0.1"}, timeout=10)
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert stuck.generations.current.uses == 0


def test_a_client_that_leaves_while_its_prompt_is_routed_frees_its_place(stuck: Any) -> None:
    admission = stuck.app.state.service.admission
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{stuck.url}/v1/chat/completions", json={"model": "pair", "messages": PROMPT}, timeout=0.3)
    until(lambda: admission.used == 0, 5)
    assert stuck.generations.current.uses == 0
