"""Scheduling on a device that holds few of the experts: none is lost, starved or mixed up; who waits blocks nobody."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, Corrupt
from xpert.experts.engines import _bank
from xpert.experts.engines.torch_lora import TorchEngine, TorchOptions
from xpert.language_model import LanguageModel
from xpert.protocols import Contrast, EngineRequest

Ask = Callable[..., EngineRequest]
Replies = Callable[..., dict[str, str]]
SETS: list[Any] = [(), (("a", 1.0),), (("b", 0.5), ("c", 0.5)), (("d", 1.0),), (("a", 0.3), ("d", 0.7)), (("c", 1.0),)]


def make_engine(lm: LanguageModel, folders: dict[str, Path], *, max_batch: int = 4, **limits: Any) -> TorchEngine:
    engine = TorchEngine(lm, max_batch=max_batch, options=TorchOptions(**limits))
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    return engine


@pytest.fixture(scope="module")
def alone(lm: LanguageModel, folders: dict[str, Path]) -> Callable[[EngineRequest], str]:
    """The reply of a request that has an engine with all experts to itself."""
    engine = make_engine(lm, folders)
    known: dict[Any, str] = {}

    def reply(request: EngineRequest) -> str:
        key = (request.prompt_ids, request.experts, request.sampling, str(request.contrast))
        if key not in known:
            known[key] = "".join(piece.text for piece in engine.generate([request]))
        return known[key]

    return reply


@given(st.integers(0, 100_000))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrivals_cancellations_and_evictions(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, alone: Callable[[EngineRequest], str], seed: int
) -> None:
    """Two or three of four adapters on the device; requests for one or two, some contrasted, some cancelled."""
    r = random.Random(seed)
    engine = make_engine(
        lm,
        folders,
        max_batch=r.choice([2, 3, 6]),
        device_experts=r.choice([2, 3]),
        host_bytes=r.choice([None, 0, 20_000]),
        patience=r.choice([1, 4]),
    )
    requests = {}
    for number in range(r.randint(4, 14)):
        request = ask(
            str(number),
            r.choice(["word ", "Add the two numbers. "]) * r.randint(1, 8),
            r.choice(SETS),
            max_tokens=r.randint(1, 6),
            temperature=r.choice([0.0, 0.9]),
            seed=number,
        )
        if request.experts and len(request.experts) == 1 and r.random() < 0.25:
            request = replace(request, contrast=Contrast("self-contrast", {}, ()))
        requests[request.id] = request
    session = engine.session()
    to_come, text = list(requests.values()), dict.fromkeys(requests, "")
    cancelled: set[str] = set()
    ended: set[str] = set()
    for _ in range(3000):
        for _ in range(r.randint(0, 3)):
            if to_come:
                session.submit(to_come.pop())
        if r.random() < 0.1 and session.pending:
            victim = r.choice(sorted(session.pending))
            session.cancel(victim)
            cancelled.add(victim)
        for piece in session.step():
            assert piece.request_id not in ended | cancelled
            text[piece.request_id] += piece.text
            if piece.finished:
                ended.add(piece.request_id)
        assert len(session._batch.lanes) <= engine.max_batch
        assert engine.counters["resident"] <= 3
        if not to_come and session.idle:
            break
    assert session.failures() == []
    assert ended | cancelled == set(requests) and not ended & cancelled
    assert {key: text[key] for key in ended} == {key: alone(requests[key]) for key in ended}
    counters = engine.counters
    assert counters["uploads"] - counters["evictions"] == counters["resident"]


def test_a_request_that_waits_for_its_adapter_blocks_no_other(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs for one expert; requests for others, come later, are answered to their end."""
    engine = make_engine(lm, {key: folders[key] for key in "ac"}, host_bytes=0)
    for key in "ac":
        engine._bank.release(engine._bank.wait([engine._bank.resolve(key)]))
    engine.add_expert("d", folders["d"])
    free = threading.Event()
    read = _bank.read_adapter

    def slow(key: str, *rest: Any, **more: Any) -> Any:
        if key == "d":
            assert free.wait(30)
        return read(key, *rest, **more)

    monkeypatch.setattr(_bank, "read_adapter", slow)
    session = engine.session()
    session.submit(ask("slow", "Add", (("d", 1.0),), max_tokens=2))
    for number in range(6):
        session.submit(ask(str(number), "Add the two", (("ac"[number % 2], 1.0),), max_tokens=4))
    ended: list[str] = []
    while len(ended) < 6:
        ended += [piece.request_id for piece in session.step() if piece.finished]
    assert "slow" not in ended and session.pending == {"slow"}
    free.set()
    while not session.idle:
        ended += [piece.request_id for piece in session.step() if piece.finished]
    assert ended[-1] == "slow" and session.failures() == []


def test_a_crowd_does_not_starve_a_request(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    """One adapter fits; requests for one expert never cease, and another's request still gets its turn."""
    engine = make_engine(lm, folders, max_batch=2, device_experts=1, patience=3)
    session = engine.session()
    number = 0

    def crowd() -> None:
        nonlocal number
        while len(session.pending) < 4:
            session.submit(ask(f"crowd{number}", "x", (("a", 1.0),), max_tokens=3))
            number += 1

    crowd()
    session.step()
    session.submit(ask("other", "x", (("b", 1.0),), max_tokens=2))
    ended: list[str] = []
    for _ in range(400):
        crowd()
        ended += [piece.request_id for piece in session.step() if piece.finished]
        if "other" in ended:
            break
    assert "other" in ended and len(ended) < 60
    session.close()


def test_files_that_changed_fail_their_request_alone(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, copy: Path
) -> None:
    engine = make_engine(lm, {"a": folders["a"]}, host_bytes=0)
    engine.add_expert("gone", copy)
    (copy / "adapter_model.safetensors").write_bytes((folders["b"] / "adapter_model.safetensors").read_bytes())
    session = engine.session()
    session.submit(ask("gone", "Add", (("gone", 1.0),), max_tokens=2))
    session.submit(ask("fine", "Add", (("a", 1.0),), max_tokens=2))
    ended = set()
    while not session.idle:
        ended |= {piece.request_id for piece in session.step() if piece.finished}
    assert ended == {"fine"}
    ((failed, error),) = session.failures()
    assert failed == "gone" and isinstance(error, (Corrupt, BadInput))


def test_a_set_that_never_fits_is_refused(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    engine = make_engine(lm, folders, device_experts=2)
    with pytest.raises(BadInput, match="they never fit"):
        list(engine.generate([ask("q", "x", (("a", 1.0), ("b", 1.0), ("c", 1.0)))]))


def test_many_experts_on_a_small_device(
    lm: LanguageModel, make_adapter: Callable[..., Path], ask: Ask, replies: Replies
) -> None:
    """Forty experts, three on the device: every request gets its own, and the counters say what it took."""
    folders = {f"e{number}": make_adapter(seed=number, r=2, target_modules=["q_proj"]) for number in range(40)}
    engine = make_engine(lm, folders, device_experts=3, host_bytes=0)
    requests = [ask(key, "Add the two numbers.", ((key, 4.0),), max_tokens=4) for key in folders]
    found = replies(requests, engine)
    plain = make_engine(lm, folders)
    assert found == replies(requests, plain)
    assert engine.counters["experts"] == 40 and engine.counters["resident"] <= 3
    assert engine.counters["loads"] >= 40 and engine.counters["misses"] == 40


def test_scores_on_a_small_device(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    """More experts in one call than the device holds at once."""
    requests = [ask(f"{n}-{key}", "Which?", ((key, 1.0),)) for n in range(2) for key in "abcd"]
    continuations = [(5, 6), (7,)] * 4
    small = make_engine(lm, folders, device_experts=1).continuation_logprobs(requests, continuations)
    whole = make_engine(lm, folders).continuation_logprobs(requests, continuations)
    for one, other in zip(small, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_an_abandoned_generator_lets_its_adapters_go(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    engine = make_engine(lm, folders, device_experts=1)
    pieces = engine.generate([ask("long", "Add", (("a", 1.0),), max_tokens=100, stop=("never",))])
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert list(engine.generate([ask("next", "Add", (("b", 1.0),), max_tokens=2)]))[-1].finished
