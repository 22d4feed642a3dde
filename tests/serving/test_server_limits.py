"""A full queue, deadlines, clients that leave, and what a request may bring."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.leaving import opened, until
from xpert.errors import BadInput
from xpert.experts.mixture import Mixture
from xpert.experts.server.admission import Admission
from xpert.experts.server.failures import Busy
from xpert.experts.server.streams import merged

LONG = {"model": "me/casing", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 400}


# ── admission ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(min_value=-5, max_value=5).filter(bool), max_size=40))
def test_places_are_counted(moves: list[int]) -> None:
    admission = Admission(3, 4, clock=lambda: 0.0)
    held: list[int] = []
    for move in moves:
        if move > 0:
            free = admission.most - admission.used
            try:
                admission.enter(move)
                held.append(move)
                assert move <= free
            except Busy as refused:
                assert move > free
                assert 1 <= refused.retry_after <= 60
        elif held:
            admission.leave(held.pop())
        assert admission.used == sum(held) <= admission.most


def test_the_time_to_come_again_follows_the_pace() -> None:
    now = [0.0]
    admission = Admission(1, 9, clock=lambda: now[0])
    for _ in range(10):
        admission.enter(1)
    for _ in range(6):
        now[0] += 4.0
        admission.leave(1)
        admission.enter(1)
    assert admission.wait_for(1) == pytest.approx(4.0)
    assert admission.wait_for(3) == pytest.approx(12.0)


def test_more_than_all_places_is_the_requests_fault() -> None:
    with pytest.raises(BadInput, match="asks for 6 replies, and this server takes 5 at a time"):
        Admission(2, 3).enter(6)


def test_a_full_queue_refuses_and_says_when_to_come_again(pair: Mixture, serve: Callable[..., Any]) -> None:
    served = serve(pair, max_batch=1, max_queue=1)
    held = [opened(served.url, LONG) for _ in range(2)]
    until(lambda: served.active() == 2)
    refused = httpx.post(f"{served.url}/v1/chat/completions", json=LONG)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"] == {
        "message": "the queue is full: 1 replies run and 1 wait. Come again after the seconds in Retry-After",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    load = httpx.get(f"{served.url}/v1/load").json()
    assert (load["running"] + load["waiting"], load["refused"]) == (2, 1)
    for connection in held:  # whoever leaves frees a place, whether it was computed or waited
        connection.close()
    until(lambda: served.active() == 0)
    assert httpx.post(f"{served.url}/v1/chat/completions", json={**LONG, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_frees_its_place(pair: Mixture, serve: Callable[..., Any], stream: bool) -> None:
    served = serve(pair, max_batch=1, max_queue=4)
    first = opened(served.url, LONG)
    until(lambda: served.active() == 1)
    second = opened(served.url, {**LONG, "stream": stream})
    until(lambda: served.active() == 2)
    second.close()
    until(lambda: served.active() == 1)
    first.close()
    until(lambda: served.active() == 0)
    assert served.generations.current.uses == 0


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_ends_a_whole_answer_with_408(served: Any) -> None:
    late = httpx.post(f"{served.url}/v1/chat/completions", json=LONG, headers={"x-xpert-timeout": "0.05"})
    assert late.status_code == 408
    assert late.json()["error"]["code"] == "deadline_exceeded"
    until(lambda: served.active() == 0)


def test_a_deadline_ends_a_stream_with_an_error(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = served.app.state.service.speaker.loop._session
    plain = session.step

    def slowly() -> Any:
        time.sleep(0.01)  # or an idle machine is through before the deadline
        return plain()

    monkeypatch.setattr(session, "step", slowly)
    body = {**LONG, "stream": True}
    late = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers={"x-xpert-timeout": "0.3"})
    if late.status_code == 408:  # not even its first token came
        return
    events = late.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    until(lambda: served.active() == 0)


def test_the_servers_own_deadline_holds(pair: Mixture, serve: Callable[..., Any]) -> None:
    served = serve(pair, deadline=0.1)
    late = httpx.post(f"{served.url}/v1/chat/completions", json=LONG, headers={"x-xpert-timeout": "1000"})
    assert late.status_code == 408


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan"])
def test_a_senseless_deadline_is_refused(served: Any, value: str) -> None:
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=LONG, headers={"x-xpert-timeout": value})
    assert reply.status_code == 400
    assert "x-xpert-timeout" in reply.json()["error"]["message"]


# ── bodies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused(pair: Mixture, serve: Callable[..., Any], declared: bool) -> None:
    served = serve(pair, max_body=2000)
    content = json.dumps({**LONG, "user": "x" * 4000}).encode()
    sent: Any = content if declared else iter([content[:100], content[100:]])
    reply = httpx.post(f"{served.url}/v1/chat/completions", content=sent)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "long " * 100_000}]}, "messages"),
        ("/v1/route", {"messages": [{"role": "user", "content": "long " * 100_000}]}, "messages"),
        ("/v1/completions", {"prompt": ["short", "long " * 100_000]}, "prompt"),
    ],
)  # fmt: skip
def test_a_text_that_no_context_holds_is_refused_before_its_tokens_are_counted(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    async def prepare(work: Any) -> Any:
        raise AssertionError("it was prepared")

    monkeypatch.setattr(served.app.state.service.speaker, "prepare", prepare)
    reply = httpx.post(f"{served.url}{path}", json={"model": "pair", **body})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert "has 500,000 characters, and the base model's context holds 512 tokens" in reply.json()["error"]["message"]


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merged_streams_keep_each_ones_order_and_end_with_the_first_error() -> None:
    closed: list[str] = []

    async def count(name: str, most: int, fails: bool = False) -> Any:
        try:
            for number in range(most):
                await asyncio.sleep(0)
                yield number
            if fails:
                raise ValueError(name)
        finally:
            closed.append(name)

    async def run() -> None:
        items = [item async for item in merged([count("a", 3), count("b", 5)])]
        assert [number for index, number in items if index == 0] == [0, 1, 2]
        assert [number for index, number in items if index == 1] == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="c"):
            async for _ in merged([count("c", 1, fails=True), count("d", 10_000)]):
                pass
        assert closed == ["a", "b", "c", "d"]

    asyncio.run(run())
