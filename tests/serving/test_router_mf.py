"""Router mf: who beats whom, learned from pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.serving.observing import experts_of, learned, observed, opened, request, requests_of
from xpert.errors import BadInput, NotFound
from xpert.experts.routers import _factors
from xpert.experts.routers._factors import Factors, winning_pairs
from xpert.protocols import Observations, RoutableExpert, RouteRequest
from xpert.records import Message, Row


@pytest.fixture
def experts(rows: list[Row]) -> list[RoutableExpert]:
    return experts_of(rows)


@pytest.fixture
def seen(rows: list[Row], experts: list[RoutableExpert]) -> Observations:
    return observed(experts, requests_of(rows[:150]), noise=0.1)


@pytest.mark.parametrize("params", [{}, {"constant": "false"}, {"ties": "loss"}])
def test_the_winner_of_the_prompt_s_kind_answers(
    params: dict[str, str], experts: Any, seen: Observations, columns: Callable[..., Any]
) -> None:
    router, state = learned("mf", experts, seen, **params)
    made = columns(100, seed=77)
    asked = [RouteRequest(c["id"], (Message("user", f"{c['instruction']}\n\n{c['input']}"),)) for c in made]
    wanted = [() if c["skill"] in ("colour", "city") else ((f"x/{c['skill']}", 1.0),) for c in made]
    routes = router.route(asked)
    assert sum(route.experts == best for route, best in zip(routes, wanted, strict=True)) >= 95
    assert state.facts["training"]["held_out_accuracy"] > 0.75
    assert routes[1].reason.startswith("x/casing beats the base with probability 0.")
    assert "; next x/" in routes[1].reason
    assert routes[3].reason.endswith("under 0.50; the base answers")


def test_a_chance_is_how_often_the_expert_wins(experts: Any, rows: list[Row]) -> None:
    """Of 200 prompts alike an expert beats the base on 150, another on 50: the chances are the shares of wins."""
    asked = [RouteRequest(f"{place:03}", (Message("user", "Add the two numbers."),)) for place in range(200)]
    place = np.arange(200)
    scores = np.column_stack([place % 4 != 0, place % 4 == 0, np.zeros(200), np.full(200, 0.5)]).astype(float)
    table = Observations(tuple(asked), (*(expert.key for expert in experts), "base"), scores, 1 - scores)
    router, _ = learned("mf", experts, table, noise="0", epochs="200")
    chances = {candidate.expert: candidate.score for candidate in router.route(asked[:1])[0].candidates}
    # The model ties all pairs together, so that those against the third expert, which never wins, pull a little.
    assert chances["x/arithmetic"] == pytest.approx(0.75, abs=0.08)
    assert chances["x/casing"] == pytest.approx(0.25, abs=0.08)
    assert chances["x/reversal"] < 0.1


def test_an_expert_that_always_wins_wins_on_foreign_prompts_too(experts: Any, seen: Observations) -> None:
    best = replace(seen, scores=np.tile([0.2, 0.9, 0.2, 0.5], (150, 1)))
    router, _ = learned("mf", experts, best, epochs="50")
    for far in ("¿Dónde está la biblioteca?", ""):
        assert router.route([request(far)])[0].experts == (("x/casing", 1.0),)


@pytest.mark.parametrize("threshold", ["0", "0.5", "0.9", "1"])
def test_the_base_answers_under_the_threshold(threshold: str, experts: Any, seen: Observations) -> None:
    router, _ = learned("mf", experts, seen, threshold=threshold, top="2", epochs="30")
    for route in router.route(seen.requests):
        above = [c.expert for c in route.candidates if c.score >= float(threshold)]
        assert [key for key, _ in route.experts] == above[:2]


def test_scores_are_the_factorisation(experts: Any, seen: Observations) -> None:
    """P(expert beats base) = sigma(s_m - s_base), s = w . (norm(P_m) * (W1 e)), written out."""
    router, state = learned("mf", experts, seen, epochs="5", dim="6")
    subjects, projection, weights = (state.tensors[name] for name in Factors.names())
    assert subjects.shape == (4, 6)
    e = np.r_[router.space.embed([seen.requests[0].prompt])[0], 1.0]
    s = [float(sum(weights * (row / np.linalg.norm(row)) * (projection @ e))) for row in subjects]
    (route,) = router.route([seen.requests[0]])
    for candidate in route.candidates:
        place = state.facts["subjects"].index(candidate.expert)
        assert candidate.score == pytest.approx(1 / (1 + np.exp(s[3] - s[place])), abs=2e-6)


def test_another_seed_gives_another_state(experts: Any, seen: Observations) -> None:
    one, other = (learned("mf", experts, seen, seed=seed, epochs="3")[1] for seed in (0, 1))
    assert not np.array_equal(one.tensors["factors.weights"], other.tensors["factors.weights"])


def test_noise_is_drawn_in_training(experts: Any, seen: Observations) -> None:
    quiet, loud = (learned("mf", experts, seen, epochs="3", noise=noise)[1] for noise in ("0", "0.5"))
    assert not np.array_equal(quiet.tensors["factors.projection"], loud.tensors["factors.projection"])


tables = st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.5, 1.0])),
        arrays.arrays(np.float64, shape, elements=st.sampled_from([0.5, 1.0, 2.0])),
    )
)


@given(tables, st.booleans())
def test_pairs_are_all_that_are_decided(drawn: Any, by_loss: bool) -> None:
    scores, losses = drawn
    wanted = [
        [row, a, b]
        for row in range(len(scores))
        for a in range(scores.shape[1])
        for b in range(scores.shape[1])
        if scores[row, a] > scores[row, b]
        or (by_loss and scores[row, a] == scores[row, b] and losses[row, a] < losses[row, b])
    ]
    assert winning_pairs(scores, losses if by_loss else None, seed=0).tolist() == wanted


def test_of_many_pairs_some_are_drawn_and_all_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_factors, "_MOST_PAIRS", 10)
    scores = np.array([np.arange(8.0), np.zeros(8), np.r_[np.ones(7), 0.5]])
    pairs = winning_pairs(scores, None, seed=0).tolist()
    assert pairs == sorted(pairs)
    assert len({tuple(pair) for pair in pairs}) == len(pairs)
    assert all(scores[row, winner] > scores[row, loser] for row, winner, loser in pairs)
    assert {pair[2] for pair in pairs if pair[:2] == [0, 7]} == set(range(7))
    assert [pair for pair in pairs if pair[0] == 2] == [[2, winner, 7] for winner in range(7)]
    assert 7 < sum(pair[0] == 0 for pair in pairs) <= 17


def test_ties_need_losses_that_are_numbers(experts: Any, seen: Observations) -> None:
    lacking = replace(seen, losses=seen.losses * np.nan)
    assert learned("mf", experts, lacking, epochs="1")
    with pytest.raises(BadInput, match="the observed loss of 'x/arithmetic' on prompt 'r00000' is nan"):
        learned("mf", experts, lacking, ties="loss")


def test_observations_without_a_winner(experts: Any, seen: Observations) -> None:
    level = replace(seen, scores=np.full_like(seen.scores, 0.5))
    with pytest.raises(BadInput, match="on no observed prompt does one subject beat another"):
        learned("mf", experts, level)
    assert learned("mf", experts, level, ties="loss", epochs="1")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"threshold": "1.5"}, BadInput, "threshold is 1.5; the most is 1"),
        ({"ties": "draw"}, NotFound, "unknown ties 'draw'"),
        ({"dim": "0"}, BadInput, "dim is 0"),
        ({"epochs": "0"}, BadInput, "epochs is 0"),
        ({"noise": "-1"}, BadInput, "noise is -1.0"),
        ({"embedding": "lsa"}, NotFound, "Did you mean 'embedder'"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[BadInput], message: str, experts: Any, seen: Any) -> None:
    with pytest.raises(error, match=message):
        learned("mf", experts, seen, **params)


def test_a_threshold_may_change_without_training(experts: Any, seen: Observations) -> None:
    _, state = learned("mf", experts, seen, epochs="3")
    assert all(route.experts == () for route in opened("mf", experts, state, threshold="1").route(seen.requests))
