"""Which experts make the best group: good ones each, and not all alike.

G* = argmin over groups of N of  sum_{m in G} (R_P(m) + R_A(m)) + R_D(G)

R_D is the rank of the group's diversity among all groups, 1 for the most diverse. The paper's diversity Omega is one
over the mean cosine of the group's pairs. Groups are ranked here by that mean itself, least first: the same order
wherever all means are above 0, and the sensible one where some are not, at which Omega has a pole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput

__all__ = ["MOST_GROUPS", "Group", "GroupSearch", "check_exact", "exact", "greedy"]

MOST_GROUPS = 500_000

_DIGITS = 6
"""Decimals of a mean cosine that count: what lies below is rounding, and would break ties by chance."""

_SAMPLES = 10_000
"""Groups from which a greedy search estimates R_D where there are more."""

Vector = NDArray[np.float64]
Groups = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Candidates by index, ascending. `rank_sum`: of R_P + R_A; `similarity`: mean cosine of its pairs, 0 for a group
    of one; `diversity_rank`: R_D among all groups of its size."""

    members: tuple[int, ...]
    rank_sum: float
    similarity: float
    diversity_rank: float

    @property
    def objective(self) -> float:
        """The less, the better."""
        return self.rank_sum + self.diversity_rank


@dataclass(frozen=True)
class GroupSearch:
    """The group, how many groups were compared, and for each candidate outside the best of them that holds it."""

    group: Group
    compared: int
    rivals: Mapping[int, Group]


def check_exact(candidates: int, size: int) -> None:
    """Raises BadInput where there are more groups than an exact search compares."""
    count = comb(candidates, min(size, candidates))
    if count > MOST_GROUPS:
        raise BadInput(
            f"{count:,} groups of {size} out of {candidates} candidates are too many to compare; the most is "
            f"{MOST_GROUPS:,}",
            hint="take --search greedy, or fewer --candidates",
        )


def exact(ranks: Vector, cosines: Vector, size: int) -> GroupSearch:
    """The best of all groups of `size` (of all candidates where there are fewer).

    ranks [m]: R_P + R_A of each candidate, least first; cosines [m, m]. Of equal groups the first is taken, in the
    order of their members. Time O(C(m, size) size^2), memory O(C(m, size) size); raises BadInput beyond 500,000 groups.
    """
    check_exact(len(ranks), size)
    size = min(size, len(ranks))
    groups = _all_groups(len(ranks), size)
    space = _Space(ranks, cosines, size, groups)
    objective = space.objective(groups)
    best = int(objective.argmin())
    return GroupSearch(space.group(groups[best]), len(groups), space.rivals(groups[best], groups, objective))


def greedy(ranks: Vector, cosines: Vector, size: int) -> GroupSearch:
    """A good group without looking at all: from the best-ranked candidates on, the exchange of one member that lowers
    the objective most, until none does.

    Arguments as for `exact`. Beyond 10,000 groups R_D is estimated from as many drawn by a fixed seed. The result is
    the best within one exchange, which need not be the best of all. Time O(size^3 (m - size)) per exchange.
    """
    size = min(size, len(ranks))
    few = comb(len(ranks), size) <= _SAMPLES
    space = _Space(ranks, cosines, size, _all_groups(len(ranks), size) if few else _some_groups(len(ranks), size))
    group = np.arange(size)
    value = float(space.objective(group[None])[0])
    compared = 1
    while True:
        nearby = _exchanges(group, len(ranks))
        if not len(nearby):
            return GroupSearch(space.group(group), compared, {})
        objective = space.objective(nearby)
        compared += len(nearby)
        best = int(objective.argmin())
        if objective[best] >= value:
            return GroupSearch(space.group(group), compared, space.rivals(group, nearby, objective))
        group, value = nearby[best], float(objective[best])


class _Space:
    """The objective of groups of one size, whose diversity is ranked `among` all of them, or a sample."""

    def __init__(self, ranks: Vector, cosines: Vector, size: int, among: Groups) -> None:
        self.size = size
        self._ranks = ranks
        self._cosines = cosines
        self._count = comb(len(ranks), size)
        self._similarities = np.sort(self._similarity(among))

    def objective(self, groups: Groups) -> Vector:
        """groups [t, size] -> [t]."""
        found: Vector = self._ranks[groups].sum(axis=1) + self._diversity_ranks(groups)
        return found

    def group(self, members: Groups) -> Group:
        row = members[None]
        return Group(
            tuple(members.tolist()),
            float(self._ranks[members].sum()),
            float(self._similarity(row)[0]),
            float(self._diversity_ranks(row)[0]),
        )

    def rivals(self, chosen: Groups, groups: Groups, objective: Vector) -> dict[int, Group]:
        found = {}
        for outside in sorted(set(range(len(self._ranks))) - set(chosen.tolist())):
            rows = np.flatnonzero((groups == outside).any(axis=1))
            found[outside] = self.group(groups[rows[objective[rows].argmin()]])
        return found

    def _diversity_ranks(self, groups: Groups) -> Vector:
        """1 for the least similar group; equal ones share the average of their ranks."""
        similarity = self._similarity(groups)
        below = np.searchsorted(self._similarities, similarity, "left")
        upto = np.searchsorted(self._similarities, similarity, "right")
        found: Vector = (below + upto) / 2 * (self._count / len(self._similarities)) + 0.5
        return found

    def _similarity(self, groups: Groups) -> Vector:
        """The mean cosine of each group's pairs, rounded; 0 for groups of one."""
        total = np.zeros(len(groups))
        for one, other in combinations(range(self.size), 2):
            total += self._cosines[groups[:, one], groups[:, other]]
        found: Vector = np.round(total / max(1, self.size * (self.size - 1) / 2), _DIGITS)
        return found


def _all_groups(count: int, size: int) -> Groups:
    return np.array(list(combinations(range(count), size)))


def _some_groups(count: int, size: int) -> Groups:
    """_SAMPLES groups, each as likely as any other; always the same ones."""
    draws = np.random.default_rng(0).random((_SAMPLES, count))
    found: Groups = np.argpartition(draws, size, axis=1)[:, :size]
    return found


def _exchanges(group: Groups, count: int) -> Groups:
    """The groups that differ from one in one member, in the order of their members."""
    members = set(group.tolist())
    others = [index for index in range(count) if index not in members]
    found = sorted(tuple(sorted((members - {out}) | {into})) for out in members for into in others)
    return np.array(found, dtype=np.int64).reshape(-1, len(group))
