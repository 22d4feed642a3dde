"""Sampling rules, each against a slow plain form, and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts.engines import _sampling
from xpert.experts.engines._sampling import Chooser, _kept, choose, token_logprobs
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest, Sampling

Ask = Callable[..., EngineRequest]
RULES = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.03, 0.473, 0.917, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 9),
)
LOGITS = st.lists(st.integers(-6, 6), min_size=10, max_size=10)  # whole numbers, so that ties happen


def plainly_kept(logits: list[float], rules: Sampling) -> dict[int, float]:
    """Token -> probability of what the rules keep, token by token in plain Python."""
    scaled = np.array(logits, dtype=np.float64) / rules.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if rules.top_k:
        order = order[: rules.top_k]
    weights = {token: float(np.exp(scaled[token] - scaled.max())) for token in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    mass = 0.0
    for token in order:
        if rules.top_p < 1 and mass >= rules.top_p and kept:
            break
        kept[token] = weights[token] / total
        mass += weights[token] / total
    likeliest = kept[order[0]]
    return {token: share for token, share in kept.items() if share >= rules.min_p * likeliest * (1 - 1e-12)}


@given(LOGITS, RULES, st.sampled_from([1, 3, 1024]))
@settings(max_examples=200, deadline=None)
def test_what_is_kept_equals_a_plain_loop(logits: list[float], rules: Sampling, size: int) -> None:
    """For any number of candidates looked at first: a row that keeps the last of them looks at all."""
    choosers = [Chooser(rules)]
    scaled = _sampling._scaled(torch.tensor([logits], dtype=torch.float32), choosers)
    probability, tokens = _kept(scaled, 10, choosers)
    found = {int(t): float(p) for t, p in zip(tokens[0], probability[0], strict=True) if p > 0}
    expected = plainly_kept(logits, rules)
    assert list(found) == list(expected)
    assert np.allclose(list(found.values()), list(expected.values()))
    drawn = Chooser(rules)
    drawn_few = Chooser(rules)
    whole = choose(torch.tensor([logits], dtype=torch.float32), [drawn])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sampling, "CANDIDATES", size)
        assert choose(torch.tensor([logits], dtype=torch.float32), [drawn_few]) == whole
    assert whole[0] in expected


@given(st.lists(st.tuples(LOGITS, RULES), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_rows_are_decided_alone(rows: list[tuple[list[float], Sampling]]) -> None:
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float32)
    together = choose(logits, [Chooser(rules) for _, rules in rows])
    assert together == [choose(logits[i : i + 1], [Chooser(rules)])[0] for i, (_, rules) in enumerate(rows)]


def test_frequencies_follow_what_is_kept() -> None:
    shares = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    logits = shares.log().repeat(6000, 1)

    def counts(**rules: Any) -> torch.Tensor:
        tokens = choose(logits, [Chooser(Sampling(temperature=1.0, seed=i, **rules)) for i in range(len(logits))])
        return torch.bincount(torch.tensor(tokens), minlength=5) / len(tokens)

    for rules, kept in (({"top_k": 3}, 3), ({"min_p": 0.3}, 3), ({"top_k": 4, "top_p": 0.6}, 2)):
        expected = torch.where(torch.arange(5) < kept, shares, 0.0)
        assert torch.allclose(counts(**rules), expected / expected.sum(), atol=0.03), rules


@given(LOGITS, st.lists(st.integers(0, 9), max_size=6), st.sampled_from([0.7, 1.3, 2.0]))
@settings(max_examples=60, deadline=None)
def test_the_repetition_penalty_is_that_of_transformers(logits: list[float], seen: list[int], penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    chooser = Chooser(Sampling(repetition_penalty=penalty), seen[:3])
    given = torch.tensor([logits, logits], dtype=torch.float32)
    _sampling._penalised(given, [chooser, Chooser(Sampling())])
    for token in seen[3:]:
        chooser.note(token)
    found = _sampling._penalised(given, [chooser, Chooser(Sampling())])
    assert torch.equal(found[1], given[1])
    expected = given[:1]
    if seen:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), given[:1].clone())
    assert torch.allclose(found[:1], expected)


def test_a_penalised_reply_equals_transformers(
    engine: TorchEngine, lm: LanguageModel, plain: Callable[..., Any], ask: Ask, replies: Callable[..., dict[str, str]]
) -> None:
    request = ask("r", "Add the two numbers. Add the two", (("a", 1.0),), max_tokens=16, repetition_penalty=1.8)
    ids = torch.tensor([request.prompt_ids])
    made = plain("a").generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1.8,
        eos_token_id=sorted(lm.stop_ids),
    )[0, len(request.prompt_ids) :]
    text = lm.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert replies([request])["r"] == text.rstrip("\ufffd")
    assert replies([replace(request, sampling=replace(request.sampling, repetition_penalty=1.0))])["r"] != text


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    found = token_logprobs(logits, [4, 0, 19], [0, 3, 99])
    for row, (token, count) in enumerate(zip([4, 0, 19], [0, 3, 20], strict=True)):
        assert found[row].token == token
        assert found[row].logprob == pytest.approx(float(expected[row, token]))
        best = expected[row].topk(count)
        assert [t for t, _ in found[row].alternatives] == best.indices.tolist()
        assert np.allclose([p for _, p in found[row].alternatives], best.values)


def test_pieces_carry_the_logprobs_of_every_token(engine: TorchEngine, lm: LanguageModel, ask: Ask) -> None:
    """Also of tokens whose text is held back for a stop string, and of the one that ends the reply."""
    wanted = ask("w", "Add the two numbers.", (("a", 1.0),), max_tokens=9, logprobs=2, temperature=0.9, seed=3, top_k=5)
    pieces = list(engine.generate([wanted, ask("other", "x", max_tokens=4)]))
    mine = [piece for piece in pieces if piece.request_id == "w"]
    tokens = [token for piece in mine for token in piece.tokens]
    assert len(tokens) == mine[-1].completion_tokens
    assert not any(piece.tokens for piece in pieces if piece.request_id == "other")
    scored = engine.continuation_logprobs([wanted], [tuple(token.token for token in tokens)])[0]
    assert np.allclose([token.logprob for token in tokens], scored, atol=1e-4)
    assert all(len(token.alternatives) == 2 for token in tokens)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"top_k": -1}, "top-k is -1; the least is 0"),
        ({"min_p": 1.5}, "min-p is 1.5; it must lie between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty is 0.0; it must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition-penalty is nan"),
        ({"logprobs": -1}, "logprobs is -1; the least is 0"),
    ],
)
def test_senseless_rules_are_refused(engine: TorchEngine, ask: Ask, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(engine.generate([ask("q", "x", **rules)]))
