"""The linear datamodeling score, on numbers whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from xpert.errors import BadInput
from xpert.influence.lds import agreement, datamodeling_score, random_control, score_interval, spearman
from xpert.influence.retraining import draw_subsets


def linear_toy(
    rows: int = 48, subsets: int = 40, targets: int = 3, noise: float = 0.0, seed: int = 0
) -> tuple[Any, Any, Any]:
    """(scores [T, n], members [M, n], effects [T, M]) of a model whose effects are the sums of its rows' own."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((targets, rows))
    members = draw_subsets(rows, 0.5, subsets, rng)
    effects = own @ members.T + noise * rng.standard_normal((targets, subsets))
    return own, members, effects


def test_true_scores_foretell_a_linear_model_and_shuffled_ones_do_not() -> None:
    own, members, effects = linear_toy(subsets=200, noise=0.3)
    assert datamodeling_score(own @ members.T, effects) > 0.98
    shuffled = np.random.default_rng(1).permuted(own, axis=1)
    assert abs(datamodeling_score(shuffled @ members.T, effects)) < 0.25
    assert datamodeling_score(-own @ members.T, effects) < -0.98


def test_least_squares_on_square_loss_is_foretold_by_influence() -> None:
    """Subsets retrained for real: ridge regression, whose effect influence functions know to first order."""
    rng = np.random.default_rng(0)
    n, d = 60, 5
    x, truth = rng.standard_normal((n, d)), rng.standard_normal(d)
    y = x @ truth + rng.standard_normal(n)
    target_x, target_y = rng.standard_normal((8, d)), rng.standard_normal(8)
    members = draw_subsets(n, 0.5, 150, rng)

    def solve(chosen: Any) -> Any:
        a = x[chosen]
        return np.linalg.solve(a.T @ a + np.eye(d), a.T @ y[chosen])

    def loss(w: Any) -> float:
        return float(((target_x @ w - target_y) ** 2).mean())

    effects = np.array([[-loss(solve(member)) for member in members]])
    w = solve(np.ones(n, bool))
    target_gradient = 2 * target_x.T @ (target_x @ w - target_y) / 8
    gradients = 2 * x * (x @ w - y)[:, None]
    influence = gradients @ np.linalg.solve(x.T @ x / n, target_gradient)
    assert datamodeling_score((influence @ members.T)[None], effects) > 0.8
    shuffled = rng.permutation(influence)
    assert abs(datamodeling_score((shuffled @ members.T)[None], effects)) < 0.3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, float) for side in zip(*pairs, strict=True))
    found = float(spearman(a, b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found == 0
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic)


def test_the_interval_holds_the_score_and_narrows_with_subsets() -> None:
    widths = []
    for subsets in (12, 200):
        own, members, effects = linear_toy(subsets=subsets, noise=8.0)
        found = score_interval(own @ members.T, effects, np.random.default_rng(0), 500)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_random_scores_score_nothing() -> None:
    _, members, effects = linear_toy(subsets=16, targets=1)
    found = random_control(members, effects, np.random.default_rng(0))
    assert abs(found.value) < 0.03
    assert -0.65 < found.low < -0.3 and 0.3 < found.high < 0.65  # 16 subsets: a standard deviation of 1 / sqrt(15)


def test_trainings_that_agree_and_those_that_do_not() -> None:
    _, _, effects = linear_toy(subsets=100)
    noise = np.random.default_rng(1).standard_normal((2, *effects.shape))
    assert agreement(np.stack([effects, effects])) == pytest.approx(1)
    assert agreement(noise) == pytest.approx(0, abs=0.2)
    assert agreement(effects[None]) is None
    # Signal and noise alike strong: one training repeats at 1/2, the mean of two at 2/3.
    halves = np.stack([effects / effects.std(), effects / effects.std()]) + noise
    assert agreement(halves) == pytest.approx(2 / 3, abs=0.12)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 20), st.floats(0.2, 0.8), st.integers(4, 6), st.integers(0, 9))
def test_subsets_are_of_one_size_and_differ(rows: int, share: float, count: int, seed: int) -> None:
    if not 0 < round(share * rows) < rows:
        return
    members = draw_subsets(rows, share, min(count, rows), np.random.default_rng(seed))
    assert set(members.sum(axis=1)) == {round(share * rows)}
    assert len({member.tobytes() for member in members}) == min(count, rows)


@pytest.mark.parametrize(("rows", "share", "count"), [(4, 0.25, 5), (10, 0.01, 4), (10, 0.99, 4), (5, 0.5, 11)])
def test_subsets_that_do_not_exist_are_refused(rows: int, share: float, count: int) -> None:
    with pytest.raises(BadInput, match=f"of {rows} rows is"):
        draw_subsets(rows, share, count, np.random.default_rng(0))
