"""Groups of experts: the exact search against brute force in plain Python, and the greedy one's gap to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts.recruiting import groups as searches
from xpert.experts.recruiting.groups import exact, greedy


def brute_force(ranks: list[float], cosines: Any, size: int) -> dict[tuple[int, ...], float]:
    """Group -> sum of ranks plus rank of diversity, ties averaged by counting."""
    groups = list(itertools.combinations(range(len(ranks)), min(size, len(ranks))))

    def alike(group: tuple[int, ...]) -> float:
        pairs = [cosines[i][j] for i, j in itertools.combinations(group, 2)]
        return round(sum(pairs) / len(pairs), 6) if pairs else 0.0

    values = [alike(group) for group in groups]
    return {
        group: sum(ranks[m] for m in group)
        + sum(other < value for other in values)
        + (sum(other == value for other in values) + 1) / 2
        for group, value in zip(groups, values, strict=True)
    }


@st.composite
def candidates(draw: st.DrawFn) -> tuple[Any, Any, int]:
    """Ranks (halves, with ties), a symmetric matrix of few different cosines, and a size that may exceed the number."""
    count = draw(st.integers(1, 6))
    ranks = sorted(draw(st.lists(st.integers(4, 20), min_size=count, max_size=count)))
    cosines = np.eye(count)
    for i, j in itertools.combinations(range(count), 2):
        cosines[i, j] = cosines[j, i] = draw(st.sampled_from([-0.5, 0.0, 0.125, 0.3, 1.0]))
    return np.array(ranks) / 2, cosines, draw(st.integers(1, count + 2))


@settings(max_examples=150, deadline=None)
@given(candidates())
def test_exact_is_the_least_of_all_groups(case: tuple[Any, Any, int]) -> None:
    ranks, cosines, size = case
    plain = brute_force(ranks.tolist(), cosines, size)
    found = exact(ranks, cosines, size)
    best = min(plain.values())
    assert found.group.objective == best == plain[found.group.members]
    assert found.group.members == next(group for group, value in plain.items() if value == best), "the first of equals"
    assert found.compared == len(plain)
    assert set(found.rivals) | set(found.group.members) == set(range(len(ranks)))
    for outside, rival in found.rivals.items():
        assert outside in rival.members
        assert rival.objective == plain[rival.members] == min(v for group, v in plain.items() if outside in group)


@settings(max_examples=150, deadline=None)
@given(candidates())
def test_greedy_is_a_group_no_better_than_the_exact_one(case: tuple[Any, Any, int]) -> None:
    ranks, cosines, size = case
    plain = brute_force(ranks.tolist(), cosines, size)
    found = greedy(ranks, cosines, size)
    assert found.group.objective == plain[found.group.members] >= min(plain.values())
    if len(found.group.members) in (1, len(ranks), len(ranks) - 1):
        assert found.group.objective == min(plain.values()), "every group is one exchange away"
    for outside, rival in found.rivals.items():
        assert outside in rival.members and len(set(rival.members) - set(found.group.members)) == 1
        assert rival.objective == plain[rival.members] >= found.group.objective


def random_case(seed: int, count: int) -> tuple[Any, Any]:
    r = np.random.default_rng(seed)
    ranks = np.sort(r.permutation(count) + r.permutation(count) + 2.0)
    vectors = r.normal(size=(count, 6)) + 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ranks, vectors @ vectors.T


@pytest.mark.parametrize(("count", "size"), [(8, 4), (12, 4), (14, 7)])
def test_the_gap_of_greedy(count: int, size: int, record_property: Callable[[str, object], None]) -> None:
    """Of 20 random cases most are exact; the gap is a small part of what the objective runs over."""
    gaps = []
    for seed in range(20):
        ranks, cosines = random_case(seed, count)
        best = exact(ranks, cosines, size).group.objective
        gaps.append(greedy(ranks, cosines, size).group.objective - best)
    record_property("mean gap", float(np.mean(gaps)))
    record_property("exact", gaps.count(0))
    assert gaps.count(0) >= 10 and max(gaps) <= 0.02 * comb(count, size) + 2


def test_greedy_estimates_the_rank_of_diversity_among_too_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """495 groups, ranked by 200 of them."""
    monkeypatch.setattr(searches, "_SAMPLES", 200)
    for seed in range(5):
        ranks, cosines = random_case(seed, 12)
        plain = brute_force(ranks.tolist(), cosines, 4)
        found = greedy(ranks, cosines, 4)
        assert found == greedy(ranks, cosines, 4), "the sample is always the same"
        assert found.group.objective == pytest.approx(plain[found.group.members], abs=40)
        assert plain[found.group.members] - min(plain.values()) <= 20


def test_diversity_decides_between_equals() -> None:
    """The second best is the twin of the best; the third, ranked a little lower, adds something else."""
    cosines = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]])
    for search in (exact, greedy):
        assert search(np.array([2.0, 4.0, 5.0]), cosines, 2).group.members == (0, 2)
        assert search(np.array([2.0, 4.0, 50.0]), cosines, 2).group.members == (0, 1)


def test_all_alike_or_all_orthogonal_leave_it_to_the_ranks() -> None:
    for cosines in (np.ones((4, 4)), np.eye(4)):
        for search in (exact, greedy):
            assert search(np.array([2.0, 3.0, 3.0, 8.0]), cosines, 3).group.members == (0, 1, 2)
            assert search(np.array([2.0, 2.0, 2.0, 2.0]), cosines, 2).group.members == (0, 1)


def test_rounding_breaks_no_tie() -> None:
    cosines = np.array([[1, 0.3, 0.3 - 1e-9], [0.3, 1, 0.3], [0.3 - 1e-9, 0.3, 1]])
    assert exact(np.array([2.0, 2.0, 2.0]), cosines, 2).group.members == (0, 1)


def test_one_candidate_and_groups_of_one() -> None:
    for search in (exact, greedy):
        alone = search(np.array([2.0]), np.ones((1, 1)), 4)
        assert alone.group.members == (0,) and alone.group.similarity == 0 and alone.rivals == {}
        first = search(np.array([2.0, 3.0]), np.eye(2), 1)
        assert first.group.members == (0,) and first.rivals[1].members == (1,)


def test_too_many_groups_are_refused_where_greedy_goes_on() -> None:
    ranks, cosines = random_case(0, 40)
    with pytest.raises(BadInput, match=r"847,660,528 groups of 10 out of 40 .* too many to compare.*--search greedy"):
        exact(ranks, cosines, 10)
    assert len(greedy(ranks, cosines, 10).group.members) == 10
