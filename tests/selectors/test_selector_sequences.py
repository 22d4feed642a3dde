"""Each fast selector against its slow plain form, and the bounds that are proven for it."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.budgeting import BudgetMeter, allocate
from xpert.selectors._coverage import SIMILARITIES, Coverage, GraphCoverage, take_greedily
from xpert.selectors._repeats import RepeatWalk
from xpert.selectors._spreading import spread, top
from xpert.selectors.kshot import _turns

few = settings(max_examples=15, deadline=None)


def points(rows: int, seed: int, *, d: int = 6) -> Any:
    drawn = np.random.default_rng(seed).normal(size=(rows, d))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def plain_greedy(similar: Any, wanted: int, bonus: Any = 0.0) -> list[int]:
    taken: list[int] = []
    covered = np.zeros(similar.shape[1])
    for _ in range(wanted):
        gains = np.maximum(similar - covered, 0).sum(axis=1) + bonus
        gains[taken] = -np.inf
        best = int(gains.argmax())
        taken.append(best)
        covered = np.maximum(covered, similar[best])
    return taken


def value(similar: Any, chosen: Any) -> float:
    return float(similar[list(chosen)].max(axis=0).sum())


@few
@given(seed=st.integers(0, 10_000), held=st.integers(1, 250), form=st.sampled_from(sorted(SIMILARITIES)))
def test_lazy_greedy_is_plain_greedy(seed: int, held: int, form: str) -> None:
    embeddings = points(200, seed)
    similar = SIMILARITIES[form](np.round(embeddings @ embeddings.T, 6)).astype(np.float64)
    cover = Coverage(embeddings, embeddings, SIMILARITIES[form], held=held)
    taken, gains, _ = take_greedily([cover], [np.arange(200)], BudgetMeter(20))
    plain = plain_greedy(similar, 20)
    # Rows that cover each other alike tie but for rounding: equal value is what must hold there.
    assert taken == plain or value(similar, taken) == pytest.approx(value(similar, plain), rel=1e-3)
    assert value(similar, taken) == pytest.approx(sum(gains), rel=1e-4)
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(gains))


@few
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 12), wanted=st.integers(1, 4))
def test_greedy_is_within_its_bound_of_the_best(seed: int, rows: int, wanted: int) -> None:
    embeddings = points(rows, seed, d=3)
    similar = SIMILARITIES["clip"](embeddings @ embeddings.T)
    wanted = min(wanted, rows)
    cover = Coverage(embeddings, embeddings, SIMILARITIES["clip"])
    taken, _, _ = take_greedily([cover], [np.arange(rows)], BudgetMeter(wanted))
    best = max(value(similar, chosen) for chosen in combinations(range(rows), wanted))
    assert value(similar, taken) >= (1 - 1 / np.e) * best - 1e-5


@few
@given(seed=st.integers(0, 10_000), held=st.integers(1, 60))
def test_covering_the_shots_is_the_plain_form(seed: int, held: int) -> None:
    embeddings, shots = points(60, seed), points(4, seed + 1)
    similar = np.maximum(np.round(embeddings @ shots.T, 6), 0).astype(np.float64)
    bonus = 0.5 * similar.max(axis=1)
    cover = Coverage(embeddings, shots, SIMILARITIES["clip"], bonus=bonus, held=held)
    taken, _, _ = take_greedily([cover], [np.arange(60)], BudgetMeter(10))
    assert taken == plain_greedy(similar, 10, bonus)


@few
@given(seed=st.integers(0, 10_000))
def test_a_complete_graph_is_the_exact_form(seed: int) -> None:
    embeddings = points(40, seed)
    cosines = np.round(embeddings @ embeddings.T, 6)
    similar = np.maximum(cosines, 0).astype(np.float64)
    np.fill_diagonal(similar, 1.0)
    graph = GraphCoverage.of_neighbours(np.tile(np.arange(40), (40, 1)), np.maximum(cosines, 0))
    taken, gains, _ = take_greedily([graph], [np.arange(40)], BudgetMeter(8))
    assert value(similar, taken) == pytest.approx(value(similar, plain_greedy(similar, 8)), rel=1e-3)
    assert value(similar, taken) == pytest.approx(sum(gains), rel=1e-4)


@few
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_blocks_merge_to_the_greedy_of_the_whole(seed: int, count: int) -> None:
    embeddings = points(60, seed)
    members = [np.arange(60)[np.arange(60) % count == block] for block in range(count)]
    covers = [Coverage(embeddings[rows], embeddings[rows], SIMILARITIES["clip"]) for rows in members]
    taken, _, blocks = take_greedily(covers, members, BudgetMeter(15))
    similar = np.maximum(np.round(embeddings @ embeddings.T, 6), 0).astype(np.float64)
    similar[np.arange(60)[:, None] % count != np.arange(60)[None] % count] = 0
    assert [row % count for row in taken] == blocks
    assert value(similar, taken) == pytest.approx(value(similar, plain_greedy(similar, 15)), rel=1e-3)


@few
@given(seed=st.integers(0, 10_000), held=st.integers(1, 90), weight=st.floats(0, 1))
def test_spreading_is_the_plain_loop(seed: int, held: int, weight: float) -> None:
    embeddings = points(80, seed)
    relevance = np.random.default_rng(seed).random(80).astype(np.float32)
    taken, values = spread(embeddings, relevance, weight, 3, BudgetMeter(30), held=held)
    cosines = np.round(embeddings @ embeddings.T, 6)
    plain = [3]
    while len(plain) < 30:
        now = relevance - np.float32(weight) * cosines[:, plain].max(axis=1)
        now[plain] = -np.inf
        plain.append(int(now.argmax()))
    assert taken == plain
    assert values[0] == relevance[3]


@few
@given(seed=st.integers(0, 10_000))
def test_the_radius_never_rises(seed: int) -> None:
    embeddings = points(120, seed)
    _, radii = spread(embeddings, np.ones(120, dtype=np.float32), 1.0, 0, BudgetMeter(60), held=9)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(radii[1:]))


@few
@given(seed=st.integers(0, 10_000), tau=st.floats(-0.5, 1), block=st.integers(1, 70))
def test_passing_over_repeats_is_the_plain_loop(seed: int, tau: float, block: int) -> None:
    embeddings = points(60, seed, d=4)
    walk = RepeatWalk(embeddings, tau, block)
    order = np.random.default_rng(seed).permutation(60)
    walk.run(order, BudgetMeter(25))
    cosines = np.round(embeddings @ embeddings.T, 6)
    kept: list[int] = []
    for row in order.tolist():
        if len(kept) < 25 and not any(cosines[row, other] > tau for other in kept):
            kept.append(row)
    assert walk.kept == kept
    for row, position in walk.repeats.items():
        assert cosines[row, kept[position]] > tau


def test_shots_take_turns() -> None:
    cosines = np.array([[0.9, 0.8], [0.7, 0.9], [0.6, 0.85], [0.5, 0.1]], dtype=np.float32)
    assert list(_turns(cosines)) == [0, 1, 2, 3]
    assert list(_turns(cosines[:, ::-1])) == [1, 0, 2, 3]


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), count=st.integers(1, 45))
def test_top_prefers_the_lowest_index(values: list[int], count: int) -> None:
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    assert top(np.array(values, dtype=np.float64), count).tolist() == sorted(order)


shares = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=8)


@given(parts=shares, total=st.integers(0, 120))
def test_shares_are_exact_and_keep_to_their_caps(parts: list[tuple[float, int]], total: int) -> None:
    weights, caps = (np.array(column) for column in zip(*parts, strict=True))
    given_ = allocate(weights, caps, total)
    assert given_.sum() == min(total, caps.sum())
    assert (given_ >= 0).all()
    assert (given_ <= caps).all()


@given(parts=shares, total=st.integers(0, 120), which=st.integers(0, 7), more=st.floats(0, 5))
def test_more_weight_never_gives_less(parts: list[tuple[float, int]], total: int, which: int, more: float) -> None:
    weights, caps = (np.array(column, dtype=float) for column in zip(*parts, strict=True))
    which %= len(parts)
    heavier = weights.copy()
    heavier[which] += more
    before = allocate(weights, caps.astype(np.int64), total)[which]
    # Largest remainders are not monotone to the last unit (the Alabama paradox).
    assert allocate(heavier, caps.astype(np.int64), total)[which] >= before - 1


def test_shares_are_proportional() -> None:
    assert allocate(np.array([1.0, 2.0, 1.0]), np.array([100, 100, 100]), 8).tolist() == [2, 4, 2]
    assert allocate(np.array([1.0, 2.0, 1.0]), np.array([100, 3, 100]), 8).tolist() == [3, 3, 2]
    assert allocate(np.array([0.0, 1.0]), np.array([5, 3]), 6).tolist() == [3, 3]


def test_a_meter_never_passes_its_limit_and_stops_only_when_nothing_fits() -> None:
    meter = BudgetMeter(10, np.array([7, 4, 3, 3, 9]))
    assert meter.walk(range(5)) == [0, 2]
    assert meter.full
    assert (meter.spent, meter.left, meter.taken) == (10, 0, 2)
    with pytest.raises(ValueError, match="taken before"):
        meter.take(0)
