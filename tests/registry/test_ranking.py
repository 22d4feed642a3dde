from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.registry.ranking import average_ranks, borda, disagreement, kemeny

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


@given(st.lists(st.integers(0, 5)))
def test_average_ranks_equal_counting_who_is_above(values: list[int]) -> None:
    task = {f"s{index}": float(value) for index, value in enumerate(values)}
    plain = {
        s: sum(o > v for o in task.values()) + (1 + sum(o == v for o in task.values())) / 2 for s, v in task.items()
    }
    assert average_ranks(task) == plain


@given(partial)
def test_kemeny_equals_trying_every_order(scores: dict[str, dict[str, float]]) -> None:
    systems = sorted({system for task in scores.values() for system in task})
    best = min(itertools.permutations(systems), key=lambda order: (disagreement(order, scores), order))
    assert kemeny(scores) == list(best)


@given(full)
def test_a_condorcet_winner_comes_first(scores: dict[str, dict[str, float]]) -> None:
    systems = sorted({system for task in scores.values() for system in task})

    def beats(one: str, other: str) -> bool:
        return sum(t[one] > t[other] for t in scores.values()) > sum(t[other] > t[one] for t in scores.values())

    winner = [s for s in systems if all(beats(s, other) for other in systems if other != s)]
    assert not winner or kemeny(scores)[0] == winner[0]


def test_what_cannot_be_ranked() -> None:
    with pytest.raises(BadInput, match="not a number"):
        borda({"t": {"a": math.nan}})
    with pytest.raises(BadInput, match="out of reach"):
        kemeny({"t": {str(number): float(number) for number in range(17)}})
    assert kemeny({"t": {f"{number:02}": float(number) for number in range(12)}})[0] == "11"
