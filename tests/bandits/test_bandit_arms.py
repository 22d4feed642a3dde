"""Arms and policies: what is pulled, what is learned, against a slow plain version and known limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.selectors._arms import Arms, neighbours
from xpert.selectors._bandits import NAMES, POLICIES, BanditOptions

unhurried = settings(max_examples=25, deadline=None)
every_policy = pytest.mark.parametrize("policy", NAMES)


def pool(sizes: list[int], *, seed: int = 0, means: Any = None, noise: float = 1.0) -> tuple[Any, Any]:
    """(labels, rewards) of clusters of these sizes, in mixed order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    centre = np.zeros(len(sizes)) if means is None else np.asarray(means, float)
    return labels, (centre[labels] + noise * rng.standard_normal(len(labels))).astype(np.float32)


def make(labels: Any, rewards: Any, many: int, *, limit: int | None = None, seed: int = 0, **more: Any) -> Arms:
    return Arms(
        labels,
        many,
        lambda rows: rewards[rows],
        np.random.default_rng(seed),
        len(labels) if limit is None else limit,
        **more,
    )


def play(arms: Arms, policy: str, *, many: int = 1, batch: int = 1, **settings: Any) -> list[int]:
    """Pulls until the limit; the arms in the order pulled."""
    options = BanditOptions(reward="similarity", policy=policy, **settings)
    pulled = []
    while not arms.done:
        index = POLICIES[policy](arms, options, many)
        chosen = arms.best(index, many)
        assert chosen, "rows are left, but no arm is open"
        assert (arms.left[chosen] > 0).all()
        arms.pull(chosen, batch, index)
        pulled += chosen
    return pulled


def start(arms: Arms) -> None:
    """One row of each arm."""
    arms.pull(np.flatnonzero(arms.sizes).tolist(), 1)


@every_policy
@unhurried
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    part=st.floats(0.05, 1),
    batch=st.integers(1, 5),
    many=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_no_row_twice_and_never_past_the_limit(
    policy: str, sizes: list[int], part: float, batch: int, many: int, seed: int
) -> None:
    labels, rewards = pool(sizes, seed=seed)
    asked: list[int] = []

    def score(rows: Any) -> Any:
        asked.extend(rows.tolist())
        return rewards[rows]

    limit = max(1, round(part * len(labels)))
    arms = Arms(labels, len(sizes), score, np.random.default_rng(seed), limit)
    play(arms, policy, batch=batch, many=many)
    assert len(asked) == len(set(asked)) == limit == arms.evaluated
    assert arms.drawn.tolist() == np.bincount(labels[asked], minlength=len(sizes)).tolist()
    assert np.flatnonzero(arms.scored).tolist() == sorted(asked)
    assert sorted([*arms.unscored().tolist(), *asked]) == list(range(len(labels)))
    assert sum(entry["rows"] for entry in arms.log) == limit
    assert sum(entry["scored"] for entry in arms.summary()[:-1]) == arms.summary()[-1]["scored"] == limit


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "uniform"])
def test_a_planted_cluster_gets_most_pulls(policy: str) -> None:
    most = []
    for seed in range(3):
        labels, rewards = pool([400] * 10, seed=seed, means=np.eye(10)[3] * 3)
        arms = make(labels, rewards, 10, limit=200, seed=seed)
        start(arms)
        play(arms, policy)
        most.append(int(arms.pulls.argmax()) == 3 and arms.pulls[3] > 100)
    assert all(most)


def test_uniform_shows_no_favour() -> None:
    labels, rewards = pool([400] * 10, means=np.eye(10)[3] * 3)
    arms = make(labels, rewards, 10, limit=1000)
    play(arms, "uniform")
    assert 60 < arms.pulls.min() <= arms.pulls.max() < 140


@pytest.mark.parametrize("policy", ["ucb1", "mean-std", "thompson", "epsilon-greedy"])
def test_without_exploration_all_are_greedy(policy: str) -> None:
    labels, rewards = pool([30] * 6, means=[0, 1, 2, 3, 4, 5], noise=0.5)
    arms = make(labels, rewards, 6, limit=90)
    start(arms)
    options = BanditOptions(reward="similarity", policy=policy, alpha=0, epsilon=0)
    while not arms.done:
        index = POLICIES[policy](arms, options, 1)
        [arm] = arms.best(index, 1)
        scale = arms.count / (arms.count + 1) if policy == "thompson" else 1.0  # a posterior is drawn to the middle
        means = np.where(arms.left > 0, arms.means() * scale, -np.inf)
        assert means[arm] == means.max()
        arms.pull([arm], 1, index)


@given(seed=st.integers(0, 200))
@unhurried
def test_exploring_without_bound_is_round_robin(seed: int) -> None:
    labels, rewards = pool([20] * 7, seed=seed, means=range(7))
    arms = make(labels, rewards, 7, limit=7 * 15, seed=seed)
    start(arms)
    pulled = play(arms, "ucb1", alpha=1e9)
    for begin in range(0, len(pulled) - 6, 7):
        assert sorted(pulled[begin : begin + 7]) == list(range(7))


def test_full_epsilon_pulls_at_random() -> None:
    labels, rewards = pool([200] * 5, means=[9, 0, 0, 0, 0])
    arms = make(labels, rewards, 5, limit=500)
    play(arms, "epsilon-greedy", epsilon=1.0, many=2)
    assert 60 < arms.pulls.min() <= arms.pulls.max() < 140


@every_policy
def test_the_scale_of_the_rewards_does_not_matter(policy: str) -> None:
    labels, rewards = pool([50] * 6, means=range(6))
    pulled = []
    for factor in (1.0, 1024.0, 1 / 1024):
        arms = make(labels, rewards * np.float32(factor), 6, limit=150)
        start(arms)
        pulled.append(play(arms, policy, batch=3))
    assert pulled[0] == pulled[1] == pulled[2]


@every_policy
def test_equal_rewards_end_cleanly(policy: str) -> None:
    labels, _ = pool([9, 1, 0, 5])
    arms = make(labels, np.full(15, 0.1, np.float32), 4)
    start(arms)
    play(arms, policy, batch=2)
    assert arms.evaluated == 15
    assert arms.spread == 0
    np.testing.assert_allclose(arms.means(), 0, atol=1e-12)
    assert arms.level == pytest.approx(0.1)


@every_policy
def test_arms_that_cannot_be_scored_come_last(policy: str) -> None:
    labels, rewards = pool([10, 10, 10], means=[0, 5, 1])
    rewards[labels == 1] = np.nan
    arms = make(labels, rewards, 3)
    start(arms)
    pulled = play(arms, policy)
    if policy != "uniform":
        assert pulled[-9:] == [1] * 9
    assert arms.summary()[-1]["not scorable"] == 10
    assert np.isfinite(arms.means()).all()


def test_a_round_scores_all_its_rows_in_one_call() -> None:
    labels, rewards = pool([10] * 4)
    calls: list[int] = []
    arms = Arms(labels, 4, lambda rows: (calls.append(len(rows)), rewards[rows])[1], np.random.default_rng(0), 40)
    arms.pull([0, 2, 3], 5)
    arms.pull([0], 20)
    assert calls == [15, 5]


@given(seed=st.integers(0, 500), radius=st.floats(0, 1.2), blocks=st.booleans(), tau=st.sampled_from([None, 0.3]))
@unhurried
def test_what_arms_learn_equals_the_plain_form(seed: int, radius: float, blocks: bool, tau: float | None) -> None:
    rng = np.random.default_rng(seed)
    many = 6
    centroids = rng.normal(size=(many, 3)) + 1
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    labels, rewards = pool([8] * many, seed=seed)
    arms = make(labels, rewards, many, near=neighbours(centroids, radius), tau=tau, blocks=blocks, seed=seed)
    history: list[tuple[int, list[float]]] = []
    for arm in rng.integers(many, size=14):
        before = arms.scored.copy()
        arms.pull([int(arm)], int(rng.integers(1, 4)))
        fresh = np.flatnonzero(arms.scored & ~before)
        if len(fresh):
            history.append((int(arm), rewards[fresh].astype(float).tolist()))
    everything = [value for _, values in history for value in values]
    level = float(np.mean(everything)) if tau is None else tau
    total, count = [0.0] * many, [0] * many
    for arm, values in history:
        for value in [sum(values) / len(values)] if blocks else values:
            for other in range(many):
                distance = 0.0 if other == arm else max(0.0, 1 - float(centroids[arm] @ centroids[other]))
                if other == arm or distance < radius:
                    total[other] += (value - level) * (1 - distance / radius if other != arm else 1.0)
                    count[other] += 1
    assert arms.count.tolist() == count
    np.testing.assert_allclose(
        arms.means(), [t / c if c else 0.0 for t, c in zip(total, count, strict=True)], atol=1e-5
    )
    assert arms.level == pytest.approx(level, abs=1e-5)
    assert arms.spread == pytest.approx(float(np.std(everything)), abs=1e-5)
    own = [[v for a, values in history if a == arm for v in values] for arm in range(many)]
    expected = [math.sqrt((sum((v - np.mean(o)) ** 2 for v in o) + np.var(everything)) / (len(o) + 1)) for o in own]
    np.testing.assert_allclose(arms.spreads(), expected, atol=1e-5)


@given(seed=st.integers(0, 500))
@unhurried
def test_shares_beyond_the_bar_are_counted(seed: int) -> None:
    labels, rewards = pool([10] * 4, seed=seed)
    arms = make(labels, rewards, 4, seed=seed)
    arms.pull([0, 1, 2], [4, 7, 1])
    known = np.flatnonzero(arms.scored)
    bar = np.quantile(rewards[known].astype(float), 0.75)
    plain = [np.mean(rewards[known][labels[known] == arm] >= bar) if arm < 3 else 0.25 for arm in range(4)]
    np.testing.assert_allclose(arms.beyond(0.25, normal=False), plain)
    from statistics import NormalDist

    tails = [
        1 - NormalDist(float(rewards[known][labels[known] == arm].mean()), float(arms.spreads()[arm])).cdf(float(bar))
        for arm in range(3)
    ]
    np.testing.assert_allclose(arms.beyond(0.25, normal=True)[:3], tails, atol=1e-5)


def test_a_quantile_as_the_level() -> None:
    labels, rewards = pool([50, 50])
    arms = make(labels, rewards, 2, quantile=0.9)
    assert arms.level == 0.0
    arms.pull([0, 1], 30)
    assert arms.level == pytest.approx(float(np.quantile(rewards[arms.scored].astype(float), 0.9)))


def test_neighbours_weigh_by_distance() -> None:
    centroids = np.array([[1, 0], [np.cos(0.3), np.sin(0.3)], [0, 1]], np.float32)
    near, weights = neighbours(centroids, 0.2)[0]
    assert near.tolist() == [0, 1]
    assert weights.tolist() == pytest.approx([1, 1 - (1 - np.cos(0.3)) / 0.2], abs=1e-5)
    assert [near.tolist() for near, _ in neighbours(centroids, 0)] == [[0], [1], [2]]
    zero = np.zeros((2, 2), np.float32)  # a cluster of empty texts is near to itself alone
    assert [near.tolist() for near, _ in neighbours(zero, 0.2)] == [[0], [1]]
