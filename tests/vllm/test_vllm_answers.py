"""The engine on vLLM answers as the torch engine does: the stand-in server loads what it is given with plain peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.engines.torch_lora import TorchEngine
from xpert.experts.engines.vllm_engine import VllmEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest, WeightedExperts

SETS: dict[str, WeightedExperts] = {
    "base": (),
    "one": (("a", 1.0),),
    "scaled": (("b", 0.5),),
    "few modules": (("c", 1.0),),
    "patterns": (("d", 1.0),),
    "two": (("a", 0.7), ("b", 0.3)),
    "unequal": (("b", 0.6), ("c", 0.4)),
    "all": (("a", 0.4), ("b", 0.3), ("c", 0.2), ("d", 0.1)),
    "negative": (("a", 1.0), ("d", -0.5)),
    "repeated": (("a", 0.5), ("c", 0.2), ("a", 0.3)),
    "cancelled out": (("a", 0.5), ("a", -0.5)),
}
PROMPTS = ("Add the two numbers.\n\n3 + 4", "Name the colour of the thing: snow", "x")


@pytest.fixture
def requests(ask: Callable[..., EngineRequest]) -> list[EngineRequest]:
    return [ask(f"{name}/{n}", prompt, experts) for name, experts in SETS.items() for n, prompt in enumerate(PROMPTS)]


def test_greedy_replies_are_the_torch_engines(
    engine: VllmEngine, torch_engine: TorchEngine, requests: list[EngineRequest], replies: Callable[..., Any]
) -> None:
    got = replies(engine, requests)
    assert got == replies(torch_engine, requests)
    assert len({text for text, _, _ in got.values()}) > len(SETS)  # else the comparison would say nothing


def test_stop_strings_and_lengths_are_the_torch_engines(
    engine: VllmEngine, torch_engine: TorchEngine, ask: Callable[..., EngineRequest], replies: Callable[..., Any]
) -> None:
    plain = replies(torch_engine, [ask("plain", PROMPTS[0], SETS["two"], max_tokens=24)])["plain"][0]
    stops = [(plain[4:6],), (plain[3:9], "never"), (plain[:1],), ("never",)]
    asked = [ask(str(n), PROMPTS[0], SETS["two"], max_tokens=24, stop=stop) for n, stop in enumerate(stops)]
    asked.append(ask("short", PROMPTS[0], SETS["two"], max_tokens=3))
    got = replies(engine, asked)
    assert got == replies(torch_engine, asked)
    assert {finished for _, finished, _ in got.values()} == {"stop", "length"}


def test_a_reply_ends_where_the_context_does(
    engine: VllmEngine, torch_engine: TorchEngine, replies: Callable[..., Any], ask: Callable[..., EngineRequest]
) -> None:
    from dataclasses import replace

    long = replace(ask("long", "x", SETS["one"], max_tokens=100), prompt_ids=tuple(range(5, 305)) + (7,) * 208)
    got = replies(engine, [long])
    assert got == replies(torch_engine, [long])
    assert got["long"][1:] == ("length", 4)


def test_scores_are_the_torch_engines(
    engine: VllmEngine, torch_engine: TorchEngine, requests: list[EngineRequest]
) -> None:
    continuations = [tuple(range(9, 10 + n % 4)) for n in range(len(requests))]
    expected = torch_engine.continuation_logprobs(requests, continuations)
    got = engine.continuation_logprobs(requests, continuations)
    assert [len(scores) for scores in got] == [len(c) for c in continuations]
    for scores, wanted in zip(got, expected, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-4)


def test_log_probabilities_come_with_the_tokens(
    engine: VllmEngine, torch_engine: TorchEngine, ask: Callable[..., EngineRequest]
) -> None:
    request = ask("r", PROMPTS[0], SETS["two"], logprobs=3)
    tokens = [token for piece in engine.generate([request]) for token in piece.tokens]
    ids = tuple(token.token for token in tokens)
    assert len(ids) > 4
    expected = torch_engine.continuation_logprobs([request], [ids])[0]
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    for token in tokens:
        assert token.alternatives[0] == (token.token, token.logprob)  # greedy
        values = [value for _, value in token.alternatives]
        assert len(values) == 3 and values == sorted(values, reverse=True)
    chosen_alone = ask("r", PROMPTS[0], SETS["two"], logprobs=0)
    found = [token for piece in engine.generate([chosen_alone]) for token in piece.tokens]
    assert tuple(token.token for token in found) == ids
    assert all(token.alternatives == () for token in found)


def test_without_logprobs_no_tokens_are_told(engine: VllmEngine, ask: Callable[..., EngineRequest]) -> None:
    assert not [token for piece in engine.generate([ask("r", "x")]) for token in piece.tokens]


def test_the_servers_loop_drives_it(
    engine: VllmEngine, torch_engine: TorchEngine, requests: list[EngineRequest], replies: Callable[..., Any]
) -> None:
    import queue

    from xpert.experts.server.engine_loop import EngineLoop

    loop = EngineLoop(engine)
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    texts = {request.id: "" for request in requests}
    for request in requests:
        loop.submit(request, heard.put)
    left = set(texts)
    while left:
        piece = heard.get(timeout=20)
        texts[piece.request_id] += piece.text
        left -= {piece.request_id} if piece.finished else set()
    loop.close()
    assert texts == {id: text for id, (text, _, _) in replies(torch_engine, requests).items()}


def test_an_expert_exchanged_under_its_name_is_another_adapter(
    engine: VllmEngine,
    torch_engine: TorchEngine,
    stand_in: Any,
    ask: Callable[..., EngineRequest],
    replies: Callable[..., Any],
    make_adapter: Callable[..., Path],
) -> None:
    asked = [ask("r", PROMPTS[0], (("a", 0.5), ("c", 0.5)))]
    before = replies(engine, asked)
    other = make_adapter(seed=99)
    for each in (engine, torch_engine):
        each.add_expert("a", other)
    after = replies(engine, asked)
    assert before != after == replies(torch_engine, asked)
    names = [body["lora_name"] for body in stand_in.bodies("/v1/load_lora_adapter")]
    paths = [body["lora_path"] for body in stand_in.bodies("/v1/load_lora_adapter")]
    assert len(set(names)) == len(set(paths)) == 2  # what a prefix cache is keyed by


def test_requests_taken_before_an_exchange_end_with_what_they_began_with(
    engine: VllmEngine, torch_engine: TorchEngine, ask: Callable[..., EngineRequest], make_adapter: Callable[..., Path]
) -> None:
    request = ask("r", PROMPTS[0], (("a", 1.0),))
    wanted = "".join(piece.text for piece in torch_engine.generate([request]))
    session = engine.session()
    session.submit(request)
    engine.remove_expert("a")
    text = ""
    while not session.idle:
        text += "".join(piece.text for piece in session.step())
    assert text == wanted and not session.failures()


def test_the_base_is_not_needed_but_for_its_shapes(
    make_engine: Callable[..., VllmEngine],
    torch_engine: TorchEngine,
    lm: LanguageModel,
    tiny_base: Path,
    requests: list[EngineRequest],
    replies: Callable[..., Any],
) -> None:
    shapes = VllmEngine.open_base(str(tiny_base))
    assert {parameter.device.type for parameter in shapes.model.parameters()} == {"meta"}
    assert (shapes.fingerprint, shapes.stop_ids, shapes.architecture) == (lm.fingerprint, lm.stop_ids, lm.architecture)
    engine = make_engine(lm=shapes)
    assert replies(engine, requests[:9]) == replies(torch_engine, requests[:9])
