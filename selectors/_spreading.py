"""Greedy choice against what was chosen before: the loop that k-center and MMR share, exact and fast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter

__all__ = ["HELD", "spread", "top"]

Floats = NDArray[np.float32]

HELD = 1024
"""How many of the best rows are held at once; results depend on it no more than on the order of float32 sums."""
_BLOCK = 4096


def spread(
    embeddings: Floats, relevance: Floats, weight: float, first: int, meter: BudgetMeter, *, held: int = HELD
) -> tuple[list[int], list[float]]:
    """Takes `first`, then always the row u with the greatest relevance[u] - weight * max over taken s of cos(u, s).

    embeddings [n, d] unit rows, relevance [n] -> the rows taken until the meter is full, and the value each had when
    it was taken (the first row's is its relevance). Ties go to the lowest index. `first` must fit the meter.

    A row's value never rises, so the `held` best rows are kept apart and chosen among for as long as their best is
    above all others' last known values; then all rows are brought up to date by one matrix product. The sequence is
    the plain loop's, but for rows whose values differ by what float32 cannot tell: cosines are rounded to six
    decimals, so about 1e-6. Time O(n d b) for b taken, with about b / held passes where the values are spread out;
    memory O(n + held * d).
    """
    if not meter.take(first):
        raise ValueError("the first row does not fit the budget")
    rows, values = [first], [float(relevance[first])]
    closest = np.full(len(embeddings), -np.inf, dtype=np.float32)
    gone = np.zeros(len(embeddings), dtype=bool)
    gone[first] = True
    fresh = [first]
    while not meter.full:
        _bring_up_to_date(closest, embeddings, fresh)
        fresh = []
        current = relevance - np.float32(weight) * closest
        if meter.costs is not None:
            gone |= meter.costs > meter.left
        current[gone] = -np.inf
        hold = top(current, held)
        outside = current.copy()
        outside[hold] = -np.inf
        bound = outside.max()
        vectors, known, inside = embeddings[hold], closest[hold], current[hold]
        while not meter.full:
            best = int(inside.argmax())
            # Right after an update an equal row outside has a greater index; later it may not.
            if inside[best] == -np.inf or inside[best] < bound or (fresh and inside[best] == bound):
                break
            row = int(hold[best])
            gone[row] = True
            if meter.take(row):
                rows.append(row)
                values.append(float(inside[best]))
                fresh.append(row)
                known = np.maximum(known, np.round(vectors @ embeddings[row], 6))
                alive = inside > -np.inf
                inside[alive] = (relevance[hold] - np.float32(weight) * known)[alive]
            inside[best] = -np.inf
    return rows, values


def top(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The indices of the `count` greatest values, ascending; equal values go in by the lowest index."""
    if count >= len(values):
        return np.arange(len(values), dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)


def _bring_up_to_date(closest: Floats, embeddings: Floats, fresh: list[int]) -> None:
    anchors = embeddings[fresh].T
    for start in range(0, len(embeddings), _BLOCK):
        part = np.round((embeddings[start : start + _BLOCK] @ anchors).max(axis=1), 6)  # as if each were rounded
        np.maximum(closest[start : start + _BLOCK], part, out=closest[start : start + _BLOCK])
