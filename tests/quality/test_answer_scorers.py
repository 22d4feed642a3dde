"""IFD, EL2N, entropy, perplexity windows, complexity: by hand on single rows, and where there is nothing to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.language_model import answer_ids, encode_prompt, load_model
from xpert.records import Budget, Message, Row
from xpert.selection import choose


def row(key: str, prompt: str, response: str) -> Row:
    return Row(key, (Message("user", prompt),), response)


class Known:
    """Features whose passes give the numbers that a test wrote down."""

    options = FeatureOptions(base="given", max_length=64)

    def __init__(self, **fields: Sequence[float]) -> None:
        self.fields = {name: np.array(values, np.float32) for name, values in fields.items()}
        count = len(self.fields["nll"])
        self.pool = pool_from_rows([row(f"r{index}", f"prompt {index}", "answer") for index in range(count)])

    def base(self) -> str:
        return "given"

    def compute(self, row_pass: Any, rows: Any) -> dict[str, Any]:
        if row_pass.name == "unprompted-losses":
            return {"nll": self.fields["alone"][rows], "tokens": np.ones(len(rows), np.int32)}
        cut = self.fields.get("cut", np.zeros(len(self.pool)))
        return {**{name: values[rows] for name, values in self.fields.items()}, "cut": cut[rows] > 0}


def scorer(name: str, features: Any, **params: Any) -> Any:
    plugin = plugins.load("scorer", name)
    made = plugin(plugin.Options.from_mapping(params))
    made.prepare(features, None, np.random.default_rng(0))
    return made


def ranked(name: str, features: Any, budget: str, **params: Any) -> Any:
    plugin = plugins.load("selector", name)
    return choose(plugin(plugin.Options.from_mapping(params)), features, None, Budget.parse(budget))


@pytest.fixture
def real(tiny_base: Path) -> Callable[..., Features]:
    def make(rows: Sequence[Row], max_length: int = 128) -> Features:
        options = FeatureOptions(base=str(tiny_base), max_length=max_length)
        return Features(pool_from_rows(rows), options, cache=None, device="cpu")

    return make


def mean_loss(lm: Any, before: Sequence[int], answer: Sequence[int]) -> float:
    import torch

    with torch.no_grad():
        logits = lm.model(torch.tensor([[*before, *answer]])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return float(-np.mean([log_p[len(before) - 1 + t, token] for t, token in enumerate(answer)]))


# ── IFD ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["loss", "ppl"])
def test_ifd_of_single_rows_by_hand(mode: str, rows: list[Row], tiny_base: Path, real: Callable[..., Features]) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    found = scorer("ifd", real(rows[:6]), mode=mode).score(np.arange(6))
    prefix = lm.tokenizer("### Response:")["input_ids"]
    for index, this in enumerate(rows[:6]):
        answer = answer_ids(lm.tokenizer, [this.response])[0]
        given = mean_loss(lm, encode_prompt(lm.tokenizer, this.messages), answer)
        alone = mean_loss(lm, prefix, answer)
        ratio = given / alone if mode == "loss" else np.exp(given - alone)
        assert found[index] == pytest.approx(ratio if ratio <= 1 else -np.log(ratio), rel=1e-3, abs=1e-4)


def test_rows_above_one_follow_all_others_the_least_above_first() -> None:
    features = Known(nll=[2.0, 0.5, 1.0, 3.0, 0.9], alone=[1.0, 1.0, 1.0, 1.0, 1.0])
    found = ranked("ifd", features, "5")
    assert found.rows.tolist() == [2, 4, 1, 0, 3]
    assert found.scores.tolist() == pytest.approx([1.0, 0.9, 0.5, -np.log(2), -np.log(3)])
    assert found.reasons[0] == "IFD 1"
    assert found.reasons[3] == "IFD 2, above 1"
    assert found.log[1]["above 1"] == 2


def test_the_modes_of_ifd_rank_differently() -> None:
    features = Known(nll=[0.8, 3.0], alone=[1.0, 4.0])  # ratios of losses .8 and .75, of perplexities .82 and .37
    assert scorer("ifd", features).score(np.arange(2)).tolist() == pytest.approx([0.8, 0.75])
    assert scorer("ifd", features, mode="ppl").score(np.arange(2)).tolist() == pytest.approx(np.exp([-0.2, -1.0]))


@pytest.mark.parametrize("mode", ["loss", "ppl"])
def test_ifd_where_the_ratio_has_no_value(mode: str) -> None:
    features = Known(nll=[1.0, np.nan, 0.5, 0.0], alone=[2.0, np.nan, 0.0, 0.0], cut=[0, 1, 0, 0])
    found = ranked("ifd", features, "4", mode=mode)
    assert found.rows.tolist() == [0, 1, 2, 3]
    assert found.reasons[1] == "not scored: its prompt leaves no room for the answer"
    assert found.reasons[2] == "not scored: its answer is certain without a prompt"
    assert found.log[0] == {"step": "scores", "rows": 1, "not scored": 3}
    assert found.log[1]["no room"] == 1
    assert found.log[1]["certain without a prompt"] == 2
    assert found.log[1]["longer than the context"] == 1


def test_an_enormous_ifd_stays_a_number() -> None:
    found = ranked("ifd", Known(nll=[900.0, 5.0], alone=[1e-6, 5.0]), "2", mode="ppl")
    assert found.rows.tolist() == [1, 0]
    assert np.isfinite(found.scores).all()


# ── one number an answer ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["el2n", "entropy"])
def test_values_by_hand_and_their_order(name: str, rows: list[Row], tiny_base: Path, real: Callable[..., Any]) -> None:
    import torch

    lm = load_model(str(tiny_base), device="cpu")
    features = real(rows[:8])
    found = scorer(name, features).score(np.arange(8))
    for index, this in enumerate(rows[:8]):
        prompt, answer = encode_prompt(lm.tokenizer, this.messages), answer_ids(lm.tokenizer, [this.response])[0]
        with torch.no_grad():
            p = lm.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
        error = p - torch.nn.functional.one_hot(torch.tensor(answer), p.shape[1])
        by_hand = error.norm(dim=1).mean() if name == "el2n" else -(p * p.log()).sum(1).mean()
        assert found[index] == pytest.approx(float(by_hand), rel=1e-4)
    assert scorer(name, features, order="low").score(np.arange(8)).tolist() == (-found).tolist()


@pytest.mark.parametrize("name", ["el2n", "entropy", "perplexity", "ifd"])
def test_rows_longer_than_the_context(name: str, rows: list[Row], real: Callable[..., Features]) -> None:
    no_room = row("no-room", "word " * 300, "yes")
    cut = row("cut", "Say it.", "word " * 300)
    found = ranked(name, real([no_room, cut, *rows[:4]], 64), "6")
    assert found.rows[-1] == 0
    assert found.reasons[-1] == "not scored: its prompt leaves no room for the answer"
    assert found.log[0]["not scored"] == 1
    assert 2 in found.log[1].values()  # the two that were longer


@pytest.mark.parametrize("name", ["el2n", "entropy", "perplexity", "ifd"])
def test_a_loss_that_is_no_number_is_refused(
    name: str, rows: list[Row], real: Callable[..., Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from xpert import linear_capture

    sound = linear_capture.answer_logits

    def broken(model: Any, batch: Any, **more: Any) -> Any:
        logits, targets, index = sound(model, batch, **more)
        return torch.where((index == 0)[:, None], torch.nan, logits), targets, index

    monkeypatch.setattr(linear_capture, "answer_logits", broken)
    with pytest.raises(BadInput, match="loss is not a number"):
        scorer(name, real(rows[:3])).score(np.arange(3))


# ── perplexity windows ───────────────────────────────────────────────────────────────────────────────────────────

LOSSES = [0.1, 5.0, 2.0, 1.0, np.nan, 3.0, 4.0]  # without the NaN: quantile .2 is 1.0, .8 is 4.0


@pytest.mark.parametrize(("order", "expected"), [("high", [6, 5, 2, 3, 0, 1, 4]), ("low", [3, 2, 5, 6, 0, 1, 4])])
def test_a_window_puts_its_rows_first(order: str, expected: list[int]) -> None:
    found = ranked("perplexity", Known(nll=LOSSES), "7", order=order, low=0.2, high=0.8)
    assert found.rows.tolist() == expected
    assert found.reasons[4].endswith("below the window")
    assert found.reasons[5].endswith("above the window")
    assert found.log[2] == {"step": "window", "perplexity from": 2.718, "to": 54.6}


@given(
    losses=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=30),
    low=st.floats(0, 0.9),
    width=st.floats(0.01, 0.9),
    order=st.sampled_from(["high", "low"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_inside_a_window_precedes_whatever_is_outside(
    losses: list[float], low: float, width: float, order: str
) -> None:
    high = min(1.0, low + width)
    scores = scorer("perplexity", Known(nll=losses), low=low, high=high, order=order).score(np.arange(len(losses)))
    values = np.array(losses, np.float32)
    ends = np.quantile(values, [low, high]).astype(np.float32)
    inside = (values >= ends[0]) & (values <= ends[1])
    if inside.any() and not inside.all():
        assert scores[inside].min() > scores[~inside].max()


def test_all_alike_is_all_inside() -> None:
    found = ranked("perplexity", Known(nll=[1.0] * 5), "3", low=0.3, high=0.6)
    assert found.rows.tolist() == [0, 1, 2]


def test_without_a_window_only_the_rows_asked_for_are_read() -> None:
    features = Known(nll=[1.0, 2.0, 3.0])
    made = scorer("perplexity", features)
    made.score(np.array([2]))
    assert made.log()[0]["rows"] == 1
    assert scorer("perplexity", features, low=0.5).log()[0]["rows"] == 3


# ── complexity ───────────────────────────────────────────────────────────────────────────────────────────────────

PROOF = "First, 3 + 4 = 7. Then e.g. 7 * 2 is 14!\n\n1. So the answer is 14.\n   \n2. Done"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (PROOF, {"steps": 3, "lines": 3, "sentences": 5, "length": 21}),
        ("One. Two? Three", {"steps": 3, "lines": 1, "sentences": 3, "length": 3}),
        ("pi is 3.14 here", {"steps": 1, "lines": 1, "sentences": 1, "length": 4}),
        ("一。二。三", {"steps": 3, "lines": 1, "sentences": 3, "length": 1}),
        ("5", {"steps": 1, "lines": 1, "sentences": 1, "length": 1}),
        ("", {"steps": 0, "lines": 0, "sentences": 0, "length": 0}),
        (" \n ... \n", {"steps": 0, "lines": 1, "sentences": 0, "length": 1}),
    ],
)
def test_what_complexity_counts(text: str, counts: dict[str, int]) -> None:
    class Pool:
        pool = pool_from_rows([row("a", "One two. Three.", text)])

    for measure, count in counts.items():
        made = scorer("complexity", Pool, measure=measure)
        assert made.score(np.array([0])).tolist() == [count], measure
    assert scorer("complexity", Pool, measure="sentences", of="prompt").score(np.array([0])).tolist() == [2]
    assert made.explain(0) == f"{counts['length']} words"


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("ifd", {"mode": "los"}, "did you mean 'loss'"),
        ("perplexity", {"low": 0.9, "high": 0.1}, "low=0.9 to high=0.1 is empty"),
        ("perplexity", {"low": -0.1}, "the least is 0"),
        ("perplexity", {"high": 1.5}, "the most is 1"),
        ("el2n", {"order": "hihg"}, "did you mean 'high'"),
        ("entropy", {"odrer": "low"}, "unknown parameter 'odrer'"),
        ("complexity", {"measure": "words"}, "unknown measure 'words'"),
    ],
)
def test_mistakes(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        plugins.load("scorer", name).Options.from_mapping(params)
    assert said.lower() in str(caught.value).lower()
