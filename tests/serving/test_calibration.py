"""Curves rise and have few knots, bounds send the share that was asked for, and what is worse than nothing is left."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.experts.calibration import Calibration
from xpert.experts.router_learning.calibrating import (
    CalibrateOptions,
    best_bound,
    bound_at_chance,
    bound_at_share,
    fit_curve,
)
from xpert.experts.router_learning.measures import calibration_error, chosen_scores, reliability, risk_coverage
from xpert.protocols import Candidate, Escalation, Route

Floats = NDArray[np.float64]

scores_ = st.floats(-10, 10, allow_nan=False).map(lambda value: round(value, 6))
earned_ = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, allow_nan=False))
points = st.lists(st.tuples(scores_, earned_), min_size=1, max_size=120)


def arrays(pairs: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    table = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    return table[:, 0], table[:, 1]


def route(score: float, key: str = "a") -> Route:
    return Route(((key, 1.0),), (Candidate("b", score + 1), Candidate(key, score)), "nearest", Escalation((), 0.5))


# ── the curve ────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(points, st.integers(2, 12))
def test_a_curve_rises_within_its_bounds(pairs: list[tuple[float, float]], knots: int) -> None:
    scores, earned = arrays(pairs)
    curve = fit_curve(scores, earned, knots=knots)
    assert 1 <= len(curve.scores) <= knots
    assert all(a < b for a, b in zip(curve.scores, curve.scores[1:], strict=False))
    assert all(a <= b for a, b in zip(curve.chances, curve.chances[1:], strict=False))
    assert min(earned) - 1e-9 <= curve.chances[0]
    assert curve.chances[-1] <= max(earned) + 1e-9
    told = [curve.chance(score) for score in np.linspace(-11, 11, 200)]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (curve.chances[0], curve.chances[-1])


@settings(max_examples=60, deadline=None)
@given(points)
def test_order_changes_nothing(pairs: list[tuple[float, float]]) -> None:
    """But for rounding: sums are of the same numbers."""
    one, other = fit_curve(*arrays(pairs)), fit_curve(*arrays(sorted(pairs, key=lambda pair: pair[::-1])))
    assert one.scores == pytest.approx(other.scores)
    assert one.chances == pytest.approx(other.chances)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(earned_, earned_), min_size=2, max_size=50))
def test_a_curve_without_merging_is_isotonic_regression(earned: list[tuple[float, float]]) -> None:
    """Beside a plain one: while a block is no lower than its right neighbour, pool the two. Two points have each score,
    so that no block is too small to be one."""
    blocks = [list(pair) for pair in earned]
    place = 0
    while place < len(blocks) - 1:
        if np.mean(blocks[place]) > np.mean(blocks[place + 1]) - 1e-12:
            blocks[place : place + 2] = [blocks[place] + blocks[place + 1]]
            place = max(0, place - 1)
        else:
            place += 1
    scores = np.repeat(np.arange(len(earned), dtype=np.float64), 2)
    curve = fit_curve(scores, np.array(earned).ravel(), knots=1000)
    told = np.repeat(curve.chances, [round(n) for n in np.diff(_ends(curve.scores), prepend=0)])
    assert told == pytest.approx(np.concatenate([[float(np.mean(block))] * (len(block) // 2) for block in blocks]))


def _ends(centres: tuple[float, ...]) -> list[float]:
    """Where blocks of 0, 1, 2, ... with these means end."""
    ends = [0.0]
    for centre in centres:
        ends.append(2 * centre + 1 - ends[-1])
    return ends[1:]


def test_the_mean_chance_is_the_mean_score() -> None:
    """At the knots, weighted by their points: merging keeps sums."""
    rng = np.random.default_rng(0)
    scores = rng.random(400)
    earned = (rng.random(400) < scores).astype(float)
    curve = fit_curve(scores, earned, knots=6)
    assert len(curve.scores) <= 6
    assert np.mean([curve.chance(s) for s in scores]) == pytest.approx(earned.mean(), abs=0.02)
    assert calibration_error(np.array([curve.chance(s) for s in scores]), earned) < 0.06


def test_knots_survive_json() -> None:
    curve = fit_curve(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert Calibration.from_dict(curve.to_dict()) == curve
    assert curve.scores == pytest.approx((0.15, 0.35))
    assert curve.chances == (0.0, 1.0)
    assert curve.chance(0.25) == pytest.approx(0.5)


# ── the bound ────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(st.lists(scores_, min_size=1, max_size=80, unique=True), st.integers(-3, 90))
def test_the_share_is_exact(scores: list[float], count: int) -> None:
    below = bound_at_share(np.array(scores), count)
    sent = 0 if below is None else sum(score < below for score in scores)
    assert sent == min(max(0, count), len(scores))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=40), st.integers(0, 40))
def test_equal_scores_go_together(scores: list[float], count: int) -> None:
    below = bound_at_share(np.array(scores), count)
    sent = 0 if below is None else sum(score < below for score in scores)
    possible = [sum(score < value for score in scores) for value in (*set(scores), 1.0)]
    assert abs(sent - count) == min(abs(n - count) for n in possible)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(scores_, earned_, earned_), min_size=1, max_size=60))
def test_the_best_bound_is_the_best_of_all(triples: list[tuple[float, float, float]]) -> None:
    table = np.array(triples)
    scores, earned, base = table.T
    below = best_bound(scores, earned, base)

    def total(bound: float) -> float:
        return float(np.where(scores < bound, base, earned).sum())

    best = max(total(bound) for bound in (-math.inf, *scores.tolist(), math.inf))
    assert total(-math.inf if below is None else below) == pytest.approx(best, abs=1e-6)
    if below is None:
        assert best == pytest.approx(total(-math.inf), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(points, st.floats(0, 1))
def test_a_bound_at_a_chance(pairs: list[tuple[float, float]], chance: float) -> None:
    curve = fit_curve(*arrays(pairs))
    if curve.chances[-1] < chance:
        with pytest.raises(BadInput, match="no score reaches the chance"):
            bound_at_chance(curve, chance)
        return
    below = bound_at_chance(curve, chance)
    if below is None:
        assert curve.chances[0] >= chance
    else:
        assert curve.chance(below) >= chance - 1e-9
        assert curve.chance(below - 1e-3) < chance + 1e-9


def test_one_bound_at_most() -> None:
    with pytest.raises(BadInput, match="give one of"):
        CalibrateOptions(best=True, min_chance=0.5)


# ── applying it ──────────────────────────────────────────────────────────────────────────────────────────────────

CURVE = Calibration((0.2, 0.6), (0.1, 0.9), reject_below=0.3)


def test_a_route_says_its_chance() -> None:
    found = CURVE.applied(route(0.4))
    assert found.chance == pytest.approx(0.5)
    assert (found.experts, found.escalation) == ((("a", 1.0),), Escalation((), 0.5))
    assert found.reason == "nearest; calibrated chance 0.50"


def test_a_route_below_the_bound_is_the_bases() -> None:
    found = CURVE.applied(route(0.29))
    assert (found.experts, found.escalation) == ((), None)
    assert found.candidates == route(0.29).candidates
    assert found.chance == pytest.approx(0.28)
    assert "its score 0.29 is under the calibrated 0.3: the base answers" in found.reason
    assert CURVE.applied(route(0.3)).experts  # on the bound it stays


@pytest.mark.parametrize(
    "plain",
    [
        Route((), (), "base"),
        Route((("a", 1.0),), (), "fixed"),
        Route((("a", 1.0),), (Candidate("b", 1.0),), "another's score"),
    ],
)
def test_a_route_without_a_score_stays(plain: Route) -> None:
    assert CURVE.applied(plain) == plain


@pytest.mark.parametrize(
    ("scores", "chances"), [((), ()), ((0.1,), ()), ((0.2, 0.1), (0.1, 0.2)), ((0.1, 0.1), (0.1, 0.2))]
)
def test_knots_that_are_none(scores: tuple[float, ...], chances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="calibration"):
        Calibration(scores, chances)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_true_chances_have_no_error() -> None:
    chances = np.array([0.25] * 4 + [0.75] * 4)
    scores = np.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    assert calibration_error(chances, scores) == 0
    assert calibration_error(chances, 1 - scores) == pytest.approx(0.5)
    assert [(one.low, one.n) for one in reliability(chances, scores)] == [(0.2, 4), (0.7, 4)]


def test_a_chance_of_one_has_a_bin() -> None:
    assert [one.low for one in reliability(np.array([0.0, 1.0]), np.array([0.0, 1.0]))] == [0.0, 0.9]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.just(math.nan), scores_), earned_, earned_), min_size=1, max_size=60))
def test_risk_and_coverage_beside_a_plain_count(triples: list[tuple[float, float, float]]) -> None:
    sure, scores, base = np.array(triples).T
    found = risk_coverage(sure, scores, base)
    if np.isnan(sure).all():
        assert found is None
        return
    assert found is not None
    assert found.coverage[-1] == pytest.approx(np.mean(~np.isnan(sure)))
    for coverage, accepted, with_base, below in zip(
        found.coverage, found.accepted, found.with_base, found.below, strict=True
    ):
        kept = sure >= below
        assert coverage == pytest.approx(kept.mean())
        assert accepted == pytest.approx(scores[kept].mean())
        assert with_base == pytest.approx(np.where(kept, scores, base).mean())


def test_the_score_of_the_choice() -> None:
    """That of the expert chosen, which need not be the best candidate's."""
    found = chosen_scores([route(0.4), Route((), (Candidate("a", 0.9),), "base"), Route((("a", 1.0),), (), "fixed")])
    assert found[0] == 0.4
    assert np.isnan(found[1:]).all()
