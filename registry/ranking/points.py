"""Borda's points: one order of systems out of their ranks on several tasks.

It looks at ranks alone, so tasks may have different metrics; higher scores are better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput

__all__ = ["Scores", "as_array", "average_ranks", "borda", "ranks_of", "task_points"]

MANY = 64

Scores = Mapping[str, Mapping[str, float]]
"""task -> system -> score; a system may lack scores of some tasks."""


def borda(scores: Scores) -> dict[str, float]:
    """System -> points, most points first (equal ones by name).

    In a task of n systems, rank r (ties share the average of their ranks) earns n - r points. A system that lacks
    tasks is not punished for it: points of a task that only m of the n systems took are stretched by (n-1)/(m-1), and
    the sum over its own tasks by (all tasks)/(its tasks). A task with one system says nothing and is not counted.
    Raises BadInput for a score that is not a number. Time O(tasks * n log n). Source: de Borda 1784.
    """
    systems, array = as_array(scores)
    if not systems:
        return {}
    found = task_points(array)
    own = np.isfinite(found)
    earned = np.where(own, found, 0.0).sum(axis=0)
    telling = own.any(axis=1).sum()
    points = earned * (telling / np.maximum(own.sum(axis=0), 1))
    named = dict(zip(systems, points.tolist(), strict=True))
    return dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))


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


def as_array(scores: Scores) -> tuple[list[str], NDArray[np.float64]]:
    """The systems by name, and scores [tasks, systems] with NaN where one is missing.

    Raises BadInput for a score that is not a finite number.
    """
    systems = sorted({system for task in scores.values() for system in task})
    place = {system: number for number, system in enumerate(systems)}
    array = np.full((len(scores), len(systems)), np.nan)
    for row, (task, found) in enumerate(scores.items()):
        for system, score in found.items():
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise BadInput(f"the score of {system} on {task} is {score!r}, not a number")
            array[row, place[system]] = score
    return systems, array


def ranks_of(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """scores [..., n] -> ranks [..., n], 1 for the highest, ties averaged, NaN where there is none.

    Time O(n^2) a row up to n = 64, where many rows go at once, and O(n log n) a row beyond.
    """
    if array.shape[-1] > MANY:
        rows = [_ranks_of_row(row) for row in array.reshape(-1, array.shape[-1])]
        return np.array(rows, dtype=np.float64).reshape(array.shape)
    above = (array[..., None, :] > array[..., :, None]).sum(axis=-1, dtype=np.float64)
    equal = (array[..., None, :] == array[..., :, None]).sum(axis=-1, dtype=np.float64)
    return np.where(np.isnan(array), np.nan, above + (equal + 1) / 2)


def _ranks_of_row(row: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.sort(row[~np.isnan(row)])
    up_to = np.searchsorted(known, row, side="right")
    below = np.searchsorted(known, row, side="left")
    return np.where(np.isnan(row), np.nan, len(known) - up_to + (up_to - below + 1) / 2)


def task_points(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """scores [..., tasks, n] -> stretched points [..., tasks, n], NaN where a task does not tell of a system."""
    taken = np.isfinite(array).sum(axis=-1, keepdims=True).astype(np.float64)
    n = array.shape[-1]
    stretch = np.where(taken > 1, (n - 1) / np.maximum(taken - 1, 1), np.nan)
    found: NDArray[np.float64] = (taken - ranks_of(array)) * stretch
    return found
