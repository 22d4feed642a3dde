"""Drawing tasks and scores anew: beside ranking every draw by itself, and what must hold of any draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.registry.ranking import borda, disagreement, kemeny
from xpert.registry.ranking.bootstrap import Noise, again, again_contests, sureness
from xpert.registry.ranking.contests import Contests, contests_of
from xpert.registry.ranking.pairwise import bradley_terry

METHODS = ("borda", "kemeny", "mean", "bradley-terry")


def drawn(array: Any, draws: int, seed: int) -> Any:
    """The drawn tasks as scores, for each draw; tasks that were drawn twice stand there twice."""
    tasks = len(array)
    for counts in np.random.default_rng(seed).multinomial(tasks, np.full(tasks, 1 / tasks), size=draws):
        rows = np.repeat(np.arange(tasks), counts)
        yield {
            f"{place}": {f"s{s}": float(v) for s, v in enumerate(array[row]) if np.isfinite(v)}
            for place, row in enumerate(rows)
        }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000))
def test_every_draw_is_ranked_as_by_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 4, (4, 4)).astype(float)
    array[0, 0] = np.nan
    names = [f"s{s}" for s in range(4)]
    found = {method: again(array, method, draws=4, seed=seed, mean_over="own") for method in METHODS}
    for draw, scores in enumerate(drawn(array, 4, seed)):
        present = {s for task in scores.values() for s in task}
        if present != set(names):  # only task 0 was drawn, which s0 lacks
            assert all(np.isnan(points[draw, 0]) for points in found.values())
            continue
        expected = borda(scores)
        assert found["borda"][draw] == pytest.approx([expected[s] for s in names])
        means = [np.mean([task[s] for task in scores.values() if s in task]) for s in names]
        assert found["mean"][draw] == pytest.approx(means)
        strengths = bradley_terry(contests_of(scores)).strengths
        assert found["bradley-terry"][draw] == pytest.approx([strengths[s] for s in names], abs=1e-6)
        order = [names[s] for s in np.argsort(-found["kemeny"][draw])]
        assert disagreement(order, scores) == kemeny(scores).disagreement


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(METHODS))
def test_first_places_add_up_and_seeds_repeat(seed: int, method: str) -> None:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(5, 4))
    array[rng.random(array.shape) < 0.2] = np.nan
    array[0] = rng.normal(size=4)
    points = again(array, method, draws=20, seed=seed)
    assert np.array_equal(points, again(array, method, draws=20, seed=seed), equal_nan=True)
    found = sureness(points)
    assert found.first.sum() == pytest.approx(1) and found.draws == 20
    assert (found.low <= found.high).all() and (found.place_low <= found.place_high).all()
    assert (found.place_low >= 1).all() and (found.place_high <= 4).all()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_best_everywhere_is_first_in_every_draw(method: str) -> None:
    array = np.random.default_rng(0).random((6, 5))
    array[:, 2] = 2 + np.arange(6)
    found = sureness(again(array, method, draws=50))
    assert found.first.tolist() == [0, 0, 1, 0, 0]
    assert (found.place_low[2], found.place_high[2]) == (1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_drawing_one_task_spreads_nothing_and_drawing_its_scores_does(method: str) -> None:
    array = np.array([[0.5, 0.52, 0.1]])
    plain = again(array, method, draws=200)
    assert (plain == plain[0]).all()
    still = again(array, method, draws=200, noise=Noise(np.zeros((1, 3))))
    assert still == pytest.approx(plain)
    noisy = sureness(again(array, method, draws=200, noise=Noise(np.full((1, 3), 0.05))))
    assert 0.2 < noisy.first[0] < 0.5 < noisy.first[1] < 0.8 and noisy.first[2] == 0
    assert noisy.place_high.tolist() == [2, 2, 3]


def test_drawn_scores_stay_within_the_limits_and_missing_ones_missing() -> None:
    array = np.array([[0.99, 0.01, np.nan], [0.5, 0.5, 0.5]])
    noise = Noise(np.where(np.isfinite(array), 5.0, np.nan))
    means = again(array, "mean", draws=300, noise=noise, mean_over="own")
    known = means[np.isfinite(means)]
    assert known.min() >= 0 and known.max() <= 1 and {0.0, 1.0} <= set(known.tolist())
    missed = np.isnan(means)
    assert not missed[:, :2].any() and 0.15 < missed[:, 2].mean() < 0.35  # a draw is task 0 twice, one time in four
    assert np.isfinite(sureness(means).low).all()


def test_equal_systems_share_the_first_places() -> None:
    array = np.tile(np.array([[0.3], [0.6], [0.9]]), (1, 4))
    for method in ("borda", "mean", "bradley-terry"):
        found = sureness(again(array, method, draws=30))
        assert found.first == pytest.approx([0.25] * 4), method
        assert found.place_low.tolist() == found.place_high.tolist() == [2.5] * 4, method
    lots = sureness(again(array, "kemeny", draws=400)).first
    assert lots == pytest.approx([0.25] * 4, abs=0.1), "no name profits from the alphabet"


def test_contests_are_drawn_with_their_numbers() -> None:
    contests = Contests(("a", "b"), np.array([0]), np.array([1]), np.array([1.0]), np.array([7]))
    points = again_contests(contests, draws=5)
    alone = bradley_terry(contests).strengths
    assert points == pytest.approx(np.tile([alone["a"], alone["b"]], (5, 1)))
    mixed = Contests(("a", "b"), np.array([0, 1]), np.array([1, 0]), np.array([1.0, 1.0]), np.array([60, 40]))
    first = sureness(again_contests(mixed, draws=500)).first
    assert 0.9 < first[0] < 1  # P(a wins more than half of 100 at 0.6) is 0.97
    assert np.array_equal(again_contests(mixed, seed=3, draws=9), again_contests(mixed, seed=3, draws=9))


def test_a_block_at_a_time_makes_no_difference_of_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).random((6, 3))
    monkeypatch.setattr("xpert.registry.ranking.bootstrap.CELLS", 40)
    assert again(array, "borda", draws=11).shape == (11, 3)
    assert again(array, "borda", draws=11, noise=Noise(np.zeros((6, 3)))).shape == (11, 3)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(BadInput, match="0 draws"):
        again(np.ones((2, 2)), "borda", draws=0)
    with pytest.raises(BadInput, match="a prior above 0"):
        again(np.ones((2, 2)), "bradley-terry", prior=0)
    with pytest.raises(BadInput, match="no task is common"):
        again(np.array([[1, np.nan], [np.nan, 1]]), "mean")
    assert (again(np.array([[1, np.nan], [np.nan, 1]]), "borda", draws=3) == 0).all(), "nothing tells of anybody"


def test_rounding_of_equal_sums_makes_no_order() -> None:
    found = sureness(np.array([[0.1 + 0.2, 0.3, 0.0]]))
    assert found.first.tolist() == [0.5, 0.5, 0.0] and found.place_high.tolist() == [1.5, 1.5, 3.0]
