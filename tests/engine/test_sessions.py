"""The life of requests: joining, ending, cancelling, failing; and what a reply's pieces promise."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, NotFound, XpertError
from xpert.experts.engines._lora_layers import applied
from xpert.experts.engines._reply_text import ReplyText
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest, Piece

Ask = Callable[..., EngineRequest]
Replies = Callable[..., dict[str, str]]

LOOSE = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_requests_are_read_ahead_by_one_batch_only(engine: TorchEngine, ask: Ask) -> None:
    taken = 0

    def source() -> Iterator[EngineRequest]:
        nonlocal taken
        for index in range(40):
            taken += 1
            yield ask(str(index), "one two three", max_tokens=3)

    pieces = engine.generate(source())
    next(pieces)
    assert taken <= 2 * engine.max_batch
    ended = [piece.request_id for piece in pieces if piece.finished]
    assert sorted(ended, key=int) == [str(index) for index in range(40)]


@given(st.integers(0, 10_000))
@LOOSE
def test_random_arrivals_and_cancellations_lose_and_mix_nothing(
    engine: TorchEngine, ask: Ask, replies: Replies, seed: int
) -> None:
    r = random.Random(seed)
    sets: list[Any] = [(), (("a", 1.0),), (("b", 0.5), ("c", 0.5))]
    requests = {
        str(i): ask(str(i), "word " * r.randint(1, 9), r.choice(sets), max_tokens=r.randint(1, 6)) for i in range(9)
    }
    alone: dict[str, str] = {}
    for request in requests.values():
        alone |= replies([request])
    session = engine.session()
    to_come, text = list(requests.values()), dict.fromkeys(requests, "")
    cancelled: set[str] = set()
    ended: set[str] = set()
    for _ in range(200):
        for _ in range(r.randint(0, 3)):
            if to_come:
                session.submit(to_come.pop())
        if r.random() < 0.15 and session.pending:
            victim = r.choice(sorted(session.pending))
            session.cancel(victim)
            cancelled.add(victim)
        for piece in session.step():
            assert piece.request_id not in ended | cancelled
            text[piece.request_id] += piece.text
            if piece.finished:
                ended.add(piece.request_id)
        assert len(session._batch.lanes) <= engine.max_batch
        if not to_come and session.idle:
            break
    assert ended | cancelled == set(requests) and not ended & cancelled
    assert {key: text[key] for key in ended} == {key: alone[key] for key in ended}
    assert all(alone[key].startswith(text[key]) for key in cancelled)


def test_a_cancelled_request_frees_its_place_in_the_next_step(engine: TorchEngine, ask: Ask) -> None:
    session = engine.session()
    for index in range(engine.max_batch):
        session.submit(ask(str(index), "count", max_tokens=50, stop=("never seen",)))
    session.submit(ask("late", "count", max_tokens=50))
    session.step()
    session.cancel("2")
    session.step()
    assert {lane.of.id for lane in session._batch.lanes} == {"0", "1", "3", "late"}


def test_generate_asks_before_every_step_whether_to_go_on(engine: TorchEngine, ask: Ask) -> None:
    gone: set[str] = set()
    seen: dict[str, list[Piece]] = {"x": [], "y": []}
    requests = [ask("x", "Add the two numbers.", max_tokens=40), ask("y", "Add the two", max_tokens=40)]
    for piece in engine.generate(requests, cancelled=lambda id: id in gone):
        seen[piece.request_id].append(piece)
        if seen["x"]:
            gone.add("x")
    assert len(seen["x"]) == 1 and seen["y"][-1].finished


def test_no_request_waits_for_ever(engine: TorchEngine, ask: Ask) -> None:
    """A short request arrives among long ones that never cease; length-aware admission still takes it."""
    session = engine.session()
    session.submit(ask("short", "x", max_tokens=2))
    for index in range(30):
        session.submit(ask(f"long{index}", "word " * 30, max_tokens=2))
    ended = [piece.request_id for _ in range(3) for piece in session.step() if piece.finished]
    assert "short" in ended


def test_submitting_from_other_threads(engine: TorchEngine, ask: Ask) -> None:
    session = engine.session()
    requests = [ask(f"{t}-{i}", "one two", (("a", 1.0),), max_tokens=3) for t in range(4) for i in range(5)]

    def submit(part: list[EngineRequest]) -> None:
        for request in part:
            session.submit(request)

    threads = [threading.Thread(target=submit, args=(requests[start : start + 5],)) for start in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = set()
    while not session.idle:
        ended |= {piece.request_id for piece in session.step() if piece.finished}
    assert ended == {request.id for request in requests}


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_strings_across_tokens(engine: TorchEngine, ask: Ask, replies: Replies) -> None:
    whole = replies([ask("w", "Add the two numbers.", (("a", 1.0),), max_tokens=40)])["w"]
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    pieces = list(engine.generate([ask("s", "Add the two numbers.", (("a", 1.0),), max_tokens=40, stop=("@@", stop))]))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finished == "stop" and pieces[-1].completion_tokens < 40


@given(st.text(min_size=1, max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
@LOOSE
def test_pieces_join_to_the_text_before_the_first_stop(
    lm: LanguageModel, text: str, stop: list[str], data: st.DataObject
) -> None:
    """Characters of several bytes come as several tokens of the byte-level tokenizer."""
    stop += [text[i : i + 3] for i in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=1))]
    reply = ReplyText(lm.tokenizer, stop)
    pieces = []
    for token in lm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(reply.add(token))
        if reply.stopped:
            break
    pieces.append(reply.finish())
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    assert "".join(pieces) == (text[: min(places)] if places else text)
    assert reply.stopped == bool(places)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_in_half_is_left_out(lm: LanguageModel) -> None:
    ids = lm.tokenizer("a€", add_special_tokens=False)["input_ids"]
    reply = ReplyText(lm.tokenizer)
    assert "".join([reply.add(token) for token in ids[:-1]] + [reply.finish()]) == "a"


def test_the_reply_ends_at_the_context(engine: TorchEngine, ask: Ask) -> None:
    base = ask("c", "x", max_tokens=1000, temperature=1.0, seed=0)
    almost = dataclasses.replace(base, prompt_ids=base.prompt_ids * (engine.context - 3))
    last = list(engine.generate([almost]))[-1]
    assert last.prompt_tokens + last.completion_tokens <= engine.context
    assert last.finished in ("length", "stop")
    full = dataclasses.replace(base, prompt_ids=base.prompt_ids * engine.context)
    with pytest.raises(BadInput, match=r"request c: the prompt has 512 tokens; the context .* holds 512"):
        list(engine.generate([full]))


# ── experts come and go ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_key_with_other_content_replaces_it(
    engine: TorchEngine, ask: Ask, replies: Replies, folders: dict[str, Path]
) -> None:
    mixed = (("a", 0.5), ("c", 0.5))
    before = replies([ask("one", "Add", (("a", 1.0),)), ask("sum", "Add", mixed)])
    fingerprint = engine.experts["a"]
    engine.add_expert("a", folders["a"])
    assert engine.experts["a"] == fingerprint
    engine.add_expert("a", folders["b"])
    assert engine.experts["a"] != fingerprint
    after = replies([ask("one", "Add", (("a", 1.0),)), ask("sum", "Add", mixed)])
    assert after["one"] != before["one"] and after["sum"] != before["sum"]
    assert after["one"] == replies([ask("b", "Add", (("b", 1.0),))])["b"]


def test_requests_in_flight_keep_the_experts_they_began_with(
    engine: TorchEngine, ask: Ask, replies: Replies, folders: dict[str, Path]
) -> None:
    request = ask("r", "Add the two", (("a", 1.0), ("c", 0.5)), max_tokens=10)
    expected = replies([request])["r"]
    session = engine.session()
    session.submit(request)
    text = "".join(piece.text for piece in session.step())
    engine.add_expert("a", folders["b"])
    engine.remove_expert("c")
    while not session.idle:
        text += "".join(piece.text for piece in session.step())
    assert text == expected


def test_unknown_experts_name_the_nearest(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    engine = TorchEngine(lm)
    engine.add_expert("arithmetic", folders["a"])
    with pytest.raises(NotFound, match=r"unknown expert 'arithmetik'\. Did you mean 'arithmetic'"):
        list(engine.generate([ask("x", "Add", (("arithmetik", 1.0),))]))
    with pytest.raises(NotFound, match="Did you mean 'arithmetic'"):
        engine.remove_expert("arithmetics")
    engine.remove_expert("arithmetic")
    assert engine.experts == {}
    with pytest.raises(NotFound, match="Known: none"):
        list(engine.generate([ask("x", "Add", (("arithmetic", 1.0),))]))


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────


def state(model: Any) -> list[Any]:
    return [(name, sorted(module.__dict__), len(module._forward_hooks)) for name, module in model.named_modules()]


def test_an_exception_in_a_pass_leaves_no_trace(
    engine: TorchEngine, ask: Ask, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine.lm.model
    clean = state(model)
    requests = [ask("a", "Add", (("a", 1.0),)), ask("base", "Add")]
    expected = replies(requests)
    session = engine.session()
    session.submit(requests[0])
    session.step()
    original = type(model.model.layers[1].mlp).forward

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)
    session.submit(requests[1])
    with pytest.raises(KeyboardInterrupt):
        session.step()
    assert state(model) == clean
    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", original)
    while not session.idle:  # what waited is answered still
        session.step()
    assert replies(requests) == expected
    assert state(model) == clean


def test_anothers_shadowed_forward_is_called_and_put_back(engine: TorchEngine, mixture_of: Any) -> None:
    """accelerate puts its own `forward` into instances."""
    import torch

    layer = engine.lm.model.model.layers[0].self_attn.q_proj
    calls = []
    original = layer.forward

    def theirs(x: Any) -> Any:
        calls.append(1)
        return original(x)

    layer.forward = theirs
    try:
        plan = engine._passes.planner.make_plan([mixture_of(engine, (("a", 1.0),))], 1)
        with torch.inference_mode(), applied(engine.lm.model, plan):
            layer(torch.zeros(1, 1, 64))
        assert calls == [1] and layer.__dict__["forward"] is theirs
    finally:
        del layer.forward


def test_rows_that_cannot_be_told_apart_are_refused(engine: TorchEngine, mixture_of: Any) -> None:
    import torch

    layer = engine.lm.model.model.layers[0].self_attn.q_proj
    plan = engine._passes.planner.make_plan([mixture_of(engine, (("a", 1.0),))], 1)
    with applied(engine.lm.model, plan), pytest.raises(BadInput, match=r"q_proj .* cannot be told apart"):
        layer(torch.zeros(5, 64))


def test_a_request_whose_logits_are_not_numbers_fails_alone(engine: TorchEngine, ask: Ask, replies: Replies) -> None:
    good, bad = ask("good", "Add", (("b", 1.0),)), ask("bad", "Add", (("a", 1e38),))
    expected = replies([good])["good"]
    session = engine.session()
    session.submit(bad)
    session.submit(good)
    text, failures = "", []
    while not session.idle:
        text += "".join(piece.text for piece in session.step())
        failures += session.failures()
    assert text == expected
    assert [(id, type(error)) for id, error in failures] == [("bad", BadInput)]
    with pytest.raises(BadInput, match="request bad: the model's output is not a number with a"):
        list(engine.generate([bad]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "request q: the prompt is empty"),
        ({"prompt_ids": (1, 10**6)}, "holds a token outside 0.."),
        ({"experts": (("a", float("nan")),)}, "the weight of expert 'a' is nan"),
        ({"max_tokens": 0}, "request q: max-tokens is 0; the least is 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top-p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_senseless_requests_are_refused_and_the_others_served(
    engine: TorchEngine, ask: Ask, change: dict[str, Any], message: str
) -> None:
    request = ask("q", "Add")
    own = {key: value for key, value in change.items() if hasattr(request, key)}
    sampling = {key: value for key, value in change.items() if key not in own}
    try:
        bad = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **sampling), **own)
    except BadInput:
        return  # the sampling's own limits were quicker
    session = engine.session()
    session.submit(ask("fine", "Add", max_tokens=2))
    with pytest.raises(XpertError) as caught:
        session.submit(bad)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    ended = [piece.request_id for _ in range(3) for piece in session.step() if piece.finished]
    assert ended == ["fine"]


def test_an_id_in_flight_is_refused(engine: TorchEngine, ask: Ask) -> None:
    session = engine.session()
    session.submit(ask("q", "Add"))
    with pytest.raises(BadInput, match="request q: a request of this id is in flight"):
        session.submit(ask("q", "Add"))


def test_top_p_keeps_the_likeliest_and_frequencies_follow_the_model() -> None:
    import torch

    from xpert.experts.engines._sampling import Chooser, choose
    from xpert.protocols import Sampling

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)

    def counts(**sampling: Any) -> Any:
        tokens = choose(logits, [Chooser(Sampling(seed=i, **sampling)) for i in range(len(logits))])
        return torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)

    assert torch.allclose(counts(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    assert torch.allclose(counts(temperature=1.0, top_p=0.75), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    assert counts(temperature=1.0, top_p=1e-9)[0] == 1
    assert counts(temperature=1e-30)[0] == 1
    assert counts()[0] == 1
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(counts(temperature=0.5), squared / squared.sum(), atol=0.03)
