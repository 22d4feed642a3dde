"""Log-probabilities of prompts equal those of plain forward passes, however they are cut and batched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xpert.errors import BadInput, NotFound
from xpert.experts.engines import _prompt_logprobs
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.protocols import Contrast, EngineRequest, TokenLogprob

Ask = Callable[..., EngineRequest]

CASES = [
    ("a", "Add the two numbers. 3 + 4 and then some more of it, so that it is long"),
    (None, "Add the two numbers."),
    ("b", "one two"),
    ("c", "Which country is the city in? Paris"),
    ("a", "one two"),
    (None, "x"),
    ("d", "Spell the word backwards. mapole (case 17)"),
]


@pytest.fixture
def requests(ask: Ask) -> list[EngineRequest]:
    """More than a batch holds, of unlike lengths and experts."""
    return [ask(str(i), prompt, ((key, 1.0),) if key else ()) for i, (key, prompt) in enumerate(CASES)]


@pytest.mark.parametrize("tokens", [1, 3, 10**6])
@pytest.mark.parametrize("alternatives", [0, 3])
def test_they_equal_plain_forward_passes(
    engine: TorchEngine,
    requests: list[EngineRequest],
    plain: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    alternatives: int,
) -> None:
    """Cut into passes of `tokens` tokens for each row of a full batch."""
    monkeypatch.setattr(_prompt_logprobs, "LOGIT_BYTES", 4 * engine.max_batch * engine._passes.vocabulary * tokens)
    found = engine.prompt_logprobs(requests, alternatives)
    for (key, _), request, told in zip(CASES, requests, found, strict=True):
        with torch.inference_mode():
            expected = plain(key)(torch.tensor([request.prompt_ids])).logits[0].log_softmax(-1)
        assert [one.token for one in told] == list(request.prompt_ids[1:])
        for place, one in enumerate(told):
            assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-4)
            best = expected[place].topk(alternatives)
            assert [token for token, _ in one.alternatives] == best.indices.tolist()
            assert [value for _, value in one.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_no_pass_has_more_logits_than_allowed(engine: TorchEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = engine._passes.forward

    def counted(*given: Any, **more: Any) -> Any:
        logits = forward(*given, **more)
        sizes.append(4 * logits.numel())
        return logits

    monkeypatch.setattr(engine._passes, "forward", counted)
    limit = 4 * 5 * 4 * engine._passes.vocabulary
    monkeypatch.setattr(_prompt_logprobs, "LOGIT_BYTES", limit)
    engine.prompt_logprobs([EngineRequest(str(n), tuple(range(5, 45 + n))) for n in range(4)])
    assert len(sizes) == 9 and max(sizes) <= limit


def test_the_batch_does_not_matter(engine: TorchEngine, requests: list[EngineRequest]) -> None:
    together = engine.prompt_logprobs(requests, 2)
    for request, told in zip(requests, together, strict=True):
        (alone,) = engine.prompt_logprobs([request], 2)
        assert [one.logprob for one in told] == pytest.approx([one.logprob for one in alone], abs=1e-5)


def test_a_prompt_that_several_ask_for_is_computed_once(
    engine: TorchEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = engine._passes.forward
    monkeypatch.setattr(
        engine._passes, "forward", lambda ids, *rest, **more: rows.append(len(ids)) or forward(ids, *rest, **more)
    )
    found = engine.prompt_logprobs([ask(str(n), "Which one?", (("a", 1.0),)) for n in range(3)])
    assert rows == [1] and found[0] == found[1] == found[2] and found[0] is not found[1]


def test_prompts_that_tell_nothing(engine: TorchEngine) -> None:
    assert engine.prompt_logprobs([]) == []
    assert engine.prompt_logprobs([EngineRequest("1", (5,)), EngineRequest("2", (6,))], 3) == [[], []]
    assert len(engine.prompt_logprobs([EngineRequest("q", (5,) * 512)])[0]) == 511  # the whole context


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_ids": ()}, BadInput, "request q: the prompt is empty"),
        ({"prompt_ids": (5,) * 513}, BadInput, "request q: the prompt has 513 tokens; .* holds 512. Shorten"),
        ({"prompt_ids": (10**6,)}, BadInput, "request q: the prompt holds a token outside"),
        ({"experts": (("z", 1.0),)}, NotFound, "unknown expert 'z'"),
        ({"contrast": Contrast("self-contrast", {}, ())}, BadInput, "request q: a contrast cannot be scored"),
    ],
)
def test_what_cannot_be_scored(
    engine: TorchEngine, ask: Ask, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.prompt_logprobs([ask("fine", "x"), replace(ask("q", "x", (("a", 1.0),)), **change)])


def test_alternatives_below_zero(engine: TorchEngine, ask: Ask) -> None:
    with pytest.raises(BadInput, match="alternatives is -1; the least is 0"):
        engine.prompt_logprobs([ask("q", "x")], -1)


def test_beside_a_session(engine: TorchEngine, requests: list[EngineRequest], ask: Ask) -> None:
    """Scores, embeddings and replies on threads of their own are what they are alone."""
    replies = [ask(f"r{n}", f"Add the two numbers. {n}", (("b", 1.0),), max_tokens=20) for n in range(6)]

    def run() -> dict[str, str]:
        session, texts = engine.session(), dict.fromkeys([r.id for r in replies], "")
        for request in replies:
            session.submit(request)
        while not session.idle:
            for piece in session.step():
                texts[piece.request_id] += piece.text
        return texts

    prompts = [request.prompt_ids for request in requests]
    alone: tuple[Any, ...] = (run(), engine.prompt_logprobs(requests, 1), engine.embed(prompts).tolist())
    found: dict[str, list[Any]] = {"scores": [], "embeddings": []}

    def score() -> None:
        found["scores"] += [engine.prompt_logprobs(requests, 1) for _ in range(4)]

    def embed() -> None:
        found["embeddings"] += [engine.embed(prompts).tolist() for _ in range(8)]

    threads = [threading.Thread(target=work) for work in (score, embed)]
    for thread in threads:
        thread.start()
    assert run() == alone[0] and run() == alone[0]
    for thread in threads:
        thread.join()
    logprobs: list[list[list[TokenLogprob]]] = found["scores"]
    assert len(logprobs) == 4 and all(told == alone[1] for told in logprobs)
    assert len(found["embeddings"]) == 8 and all(rows == alone[2] for rows in found["embeddings"])
