"""One order of systems out of their scores on several tasks: Borda's points, and Kemeny's order of least disagreement.

Both look at ranks alone, so tasks may have different metrics; higher scores are better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from xpert.errors import BadInput

__all__ = ["MOST_EXACT", "average_ranks", "borda", "disagreement", "kemeny"]

MOST_EXACT = 16

Scores = Mapping[str, Mapping[str, float]]
"""task -> system -> score; a system may lack scores of some tasks."""


def borda(scores: Scores) -> dict[str, float]:
    """System -> points, most points first (equal ones by name).

    In a task of n systems, rank r (ties share the average of their ranks) earns n - r points. A system that lacks
    tasks is not punished for it: points of a task that only m of the n systems took are stretched by (n-1)/(m-1), and
    the sum over its own tasks by (all tasks)/(its tasks). A task with one system says nothing and is not counted.
    Raises BadInput for a score that is not a number. Time O(tasks * n log n). Source: de Borda 1784.
    """
    _check(scores)
    systems = sorted({system for task in scores.values() for system in task})
    telling = [average_ranks(task) for task in scores.values() if len(task) > 1]
    points = dict.fromkeys(systems, 0.0)
    for system in systems:
        own = [ranks for ranks in telling if system in ranks]
        earned = sum((len(ranks) - ranks[system]) * ((len(systems) - 1) / (len(ranks) - 1)) for ranks in own)
        points[system] = earned * (len(telling) / len(own)) if own else 0.0
    return dict(sorted(points.items(), key=lambda item: (-item[1], item[0])))


def kemeny(scores: Scores) -> list[str]:
    """The order, best first, that contradicts the fewest pairwise preferences of the tasks; exact.

    Of several such orders it is the first by the alphabet. Ties and missing scores prefer neither. Raises BadInput
    beyond 16 systems. Dynamic programming over subsets: time O(2^n n), memory O(2^n). Source: Kemeny 1959.
    """
    _check(scores)
    systems = sorted({system for task in scores.values() for system in task})
    n = len(systems)
    if n > MOST_EXACT:
        raise BadInput(f"an exact Kemeny order of {n} systems is out of reach; the most is {MOST_EXACT}")
    prefer = _preferences(scores, systems)
    # against[a][S]: preferences for a member of S over a, which placing a before all of S contradicts.
    against = [_subset_sums([prefer[b][a] for b in range(n)]) for a in range(n)]
    least = [0] * (1 << n)
    for left in range(1, 1 << n):
        least[left] = min(against[a][left & ~(1 << a)] + least[left & ~(1 << a)] for a in range(n) if left >> a & 1)
    order, left = [], (1 << n) - 1
    while left:
        for a in range(n):
            rest = left & ~(1 << a)
            if left >> a & 1 and against[a][rest] + least[rest] == least[left]:
                order.append(systems[a])
                left = rest
                break
    return order


def disagreement(order: Sequence[str], scores: Scores) -> int:
    """How many pairwise preferences of the tasks an order contradicts: the sum of Kendall distances."""
    prefer = _preferences(scores, order)
    return sum(prefer[later][earlier] for later in range(len(order)) for earlier in range(later))


def average_ranks(task: Mapping[str, float]) -> dict[str, float]:
    """System -> rank within one task, 1 for the best; ties share the average of their ranks."""
    ordered = sorted(task, key=lambda system: -task[system])
    ranks: dict[str, float] = {}
    start = 0
    while start < len(ordered):
        end = start
        while end < len(ordered) and task[ordered[end]] == task[ordered[start]]:
            end += 1
        ranks |= dict.fromkeys(ordered[start:end], (start + 1 + end) / 2)
        start = end
    return ranks


def _preferences(scores: Scores, systems: Sequence[str]) -> list[list[int]]:
    """[a][b]: the number of tasks in which a scores above b."""
    return [[sum(a in t and b in t and t[a] > t[b] for t in scores.values()) for b in systems] for a in systems]


def _subset_sums(values: Sequence[int]) -> list[int]:
    """[S]: the sum of the values whose bits are set in S."""
    sums = [0]
    for value in values:
        sums += [earlier + value for earlier in sums]
    return sums


def _check(scores: Scores) -> None:
    for task, systems in scores.items():
        for system, score in systems.items():
            if not isinstance(score, int | float) or math.isnan(score):
                raise BadInput(f"the score of {system} on {task} is {score!r}, not a number")
