"""Borda's points and Kemeny's order: beside slow plain versions, and what must hold of any order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.registry.ranking import average_ranks, borda, disagreement, kemeny
from xpert.registry.ranking.moves import descend, search
from xpert.registry.ranking.points import MANY, ranks_of
from xpert.registry.ranking.subsets import best_order

SYSTEMS = "abcdef"
full = st.integers(1, 6).flatmap(
    lambda n: st.dictionaries(
        st.sampled_from("tuvwx"),
        st.fixed_dictionaries({system: st.integers(0, 4).map(float) for system in SYSTEMS[:n]}),
        min_size=1,
    )
)
partial = st.dictionaries(
    st.sampled_from("tuvwx"), st.dictionaries(st.sampled_from(SYSTEMS), st.floats(-3, 3), min_size=1), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(full)
def test_borda_is_the_sum_of_n_minus_rank(scores: dict[str, dict[str, float]]) -> None:
    systems = sorted({system for task in scores.values() for system in task})
    plain = dict.fromkeys(systems, 0.0)
    for task in scores.values():
        for system in systems if len(systems) > 1 else ():
            better = sum(task[other] > task[system] for other in systems)
            equal = sum(task[other] == task[system] for other in systems)
            plain[system] += len(systems) - (better + (equal + 1) / 2)
    assert borda(scores) == pytest.approx(plain)
    assert list(borda(scores)) == sorted(plain, key=lambda system: (-round(borda(scores)[system], 9), system))


@settings(max_examples=60, deadline=None)
@given(partial, st.permutations(SYSTEMS))
def test_borda_treats_systems_alike(scores: dict[str, dict[str, float]], other: list[str]) -> None:
    renamed = dict(zip(SYSTEMS, other, strict=True))
    swapped = {task: {renamed[s]: score for s, score in found.items()} for task, found in scores.items()}
    assert borda(swapped) == pytest.approx({renamed[s]: points for s, points in borda(scores).items()})


def test_borda_ties_share_their_points_and_gaps_do_not_punish() -> None:
    assert average_ranks({"a": 1.0, "b": 2.0, "c": 1.0}) == {"b": 1.0, "a": 2.5, "c": 2.5}
    assert borda({"t": {"a": 1.0, "b": 1.0, "c": 0.0}}) == {"a": 1.5, "b": 1.5, "c": 0.0}
    gaps = borda({"t": {"a": 1.0, "b": 0.5, "c": 0.0}, "u": {"a": 1.0, "b": 0.5}})
    assert gaps == {"a": 4.0, "b": 2.0 * 0.5, "c": 0.0}
    assert borda({"t": {"a": 1.0}}) == {"a": 0.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5)))
def test_average_ranks_equal_counting_who_is_above(values: list[int]) -> None:
    task = {f"s{index}": float(value) for index, value in enumerate(values)}
    plain = {
        s: sum(o > v for o in task.values()) + (1 + sum(o == v for o in task.values())) / 2 for s, v in task.items()
    }
    assert average_ranks(task) == plain


@settings(max_examples=60, deadline=None)
@given(partial)
def test_kemeny_equals_trying_every_order(scores: dict[str, dict[str, float]]) -> None:
    systems = sorted({system for task in scores.values() for system in task})
    best = min(itertools.permutations(systems), key=lambda order: (disagreement(order, scores), order))
    found = kemeny(scores)
    assert found.order == best
    assert found.disagreement == found.bound == disagreement(best, scores)


@settings(max_examples=60, deadline=None)
@given(full)
def test_a_condorcet_winner_comes_first(scores: dict[str, dict[str, float]]) -> None:
    systems = sorted({system for task in scores.values() for system in task})

    def beats(one: str, other: str) -> bool:
        return sum(t[one] > t[other] for t in scores.values()) > sum(t[other] > t[one] for t in scores.values())

    winner = [s for s in systems if all(beats(s, other) for other in systems if other != s)]
    assert not winner or kemeny(scores).order[0] == winner[0]


def test_what_cannot_be_ranked() -> None:
    bad: Any
    for bad in (math.nan, math.inf, "0.5", None):
        with pytest.raises(BadInput, match=r"the score of a on t is .*, not a number"):
            borda({"t": {"a": bad}})
        with pytest.raises(BadInput, match="not a number"):
            kemeny({"t": {"a": bad}})
    assert borda({}) == {} and kemeny({}).order == () and kemeny({"t": {"a": 1.0}}).order == ("a",)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.none() | st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_ranks_of_many_rows_and_of_long_ones_are_the_same(rows: list[list[int | None]]) -> None:
    array = np.array([[np.nan if v is None else v for v in row] for row in rows])
    long = np.concatenate([array, np.full((len(array), MANY), np.nan)], axis=1)
    assert np.array_equal(ranks_of(long)[:, :5], ranks_of(array), equal_nan=True)
    for row, ranks in zip(array, ranks_of(array), strict=True):
        plain = average_ranks({str(s): v for s, v in enumerate(row) if np.isfinite(v)})
        assert {str(s): r for s, r in enumerate(ranks) if np.isfinite(r)} == plain


def plain_recursion(prefer: Any) -> int:
    """The least disagreement, subset by subset."""
    n = len(prefer)
    least = [0] * (1 << n)
    for left in range(1, 1 << n):
        least[left] = min(
            sum(prefer[b][a] for b in range(n) if left >> b & 1) + least[left & ~(1 << a)]
            for a in range(n)
            if left >> a & 1
        )
    return least[-1]


def cost(prefer: Any, order: Any) -> int:
    return sum(prefer[later][earlier] for later, earlier in itertools.combinations(reversed(list(order)), 2))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_exact_order_costs_what_the_plain_recursion_says(n: int) -> None:
    prefer = np.random.default_rng(n).integers(0, 9, (n, n)) * (1 - np.eye(n, dtype=int))
    order = best_order(prefer)
    assert sorted(order) == list(range(n))
    assert cost(prefer, order) == plain_recursion(prefer.tolist())


def circles(count: int) -> dict[str, dict[str, float]]:
    """`count` groups of three that beat each other in a circle, each group before the next one."""
    tasks: dict[str, dict[str, float]] = {"t0": {}, "t1": {}, "t2": {}}
    for group in range(count):
        for turn in range(3):
            for place in range(3):
                tasks[f"t{turn}"][f"{group:02}{'abc'[(place + turn) % 3]}"] = -10.0 * group - place
    return tasks


def test_what_majorities_hold_apart_is_solved_apart() -> None:
    found = kemeny(circles(9))
    assert len(found.order) == 27 and found.certified
    assert found.components == tuple((f"{g:02}a", f"{g:02}b", f"{g:02}c") for g in range(9))
    assert found.disagreement == 9 * 4  # each circle: two majorities against one kept, and the third broken
    assert found.disagreement < disagreement(list(reversed(found.order)), circles(9))


def test_ties_do_not_hold_a_large_group_together() -> None:
    scores = {"t": {f"{n:02}": 0.0 for n in range(30)} | {"29": 1.0}, "u": {"07": 1.0, "03": 0.5}}
    found = kemeny(scores)
    assert found.certified and found.disagreement == 0
    assert found.order.index("07") < found.order.index("03") and found.order[0] == "29"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_moves_are_bounded_by_the_best_order_and_by_borda(seed: int) -> None:
    """With a component allowed two systems only, all that is larger goes by moves."""
    rng = np.random.default_rng(seed)
    n, tasks = int(rng.integers(3, 7)), int(rng.integers(2, 6))
    array = rng.integers(0, 5, (tasks, n)).astype(float)
    scores = {str(t): {f"s{s}": float(array[t, s]) for s in range(n) if rng.random() < 0.9} for t in range(tasks)}
    exact = kemeny(scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xpert.registry.ranking.consensus.MOST_EXACT", 2)
        moved = kemeny(scores, kicks=1)
    assert sorted(moved.order) == sorted(exact.order)
    assert moved.disagreement == disagreement(moved.order, scores)
    assert moved.bound <= exact.disagreement <= moved.disagreement
    assert moved.disagreement <= disagreement(list(borda(scores)), scores)
    assert not moved.certified or moved.disagreement == exact.disagreement


def test_a_large_order_is_no_worse_than_borda_and_repeats_under_its_seed() -> None:
    rng = np.random.default_rng(3)
    scores = {str(t): {f"s{s:02}": float(rng.normal() + 0.02 * s) for s in range(60)} for t in range(7)}
    found = kemeny(scores, seed=1)
    assert max(map(len, found.components)) > 16
    assert found.bound <= found.disagreement < disagreement(list(borda(scores)), scores)
    assert kemeny(scores, seed=1) == found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_no_move_of_a_block_betters_what_was_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    half = np.triu(rng.integers(-4, 5, (7, 7)), 1)
    gain = half - half.T
    order = descend(gain, rng.permutation(7)).tolist()

    def spared(some: list[int]) -> int:
        return sum(gain[a][b] for a, b in itertools.combinations(some, 2))

    for low, middle, high in itertools.combinations(range(8), 3):
        moved = order[:low] + order[middle:high] + order[low:middle] + order[high:]
        assert spared(moved) <= spared(order)
    start = rng.permutation(7)
    assert spared(search(gain, [start], kicks=2, seed=0)) >= spared(descend(gain, start).tolist())
