"""Facility location, f(S) = sum over targets of the greatest similarity with a taken row: its greedy step, exact.

Two forms with one face: `Coverage` knows all similarities of a block (and holds the columns it needs), and
`GraphCoverage` those of a neighbour graph, all others being 0. Gains never rise as rows are taken (f is submodular),
so a gain computed earlier bounds what it is now: Minoux 1978, doi:10.1007/BFb0006528.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.selectors._spreading import top

__all__ = ["HELD", "SIMILARITIES", "Cover", "Coverage", "GraphCoverage", "take_greedily"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HELD = 1024
"""How many candidates' columns are held at once; results do not depend on it."""
_CELLS = 4_000_000

SIMILARITIES: dict[str, Callable[[Floats], Floats]] = {
    "clip": lambda cosines: np.maximum(cosines, 0),
    "shifted": lambda cosines: (cosines + np.float32(1)) * np.float32(0.5),
}
"""Cosines to similarities from 0: negative ones count as 0, or all are moved to 0..1."""


class Cover(Protocol):
    """A set being chosen: `best` is the candidate of the greatest gain, ties to the lowest index."""

    def best(self) -> tuple[int, float] | None:
        """(candidate, its exact gain), or None where none is left."""

    def take(self, candidate: int) -> None: ...

    def drop(self, candidate: int) -> None: ...


class Coverage:
    """candidates [n, d] and targets [t, d], unit rows; `bonus` [n] is added to each candidate's gain.

    The columns of the `held` candidates with the greatest bounds are kept, [held, t]; gains among them are brought
    up to date one by one, and others come in when their bounds are no longer below. Memory O(n + held t). `take` and
    `drop` are for the candidate that `best` gave last.
    """

    def __init__(
        self,
        candidates: Floats,
        targets: Floats,
        similarity: Callable[[Floats], Floats],
        *,
        bonus: NDArray[np.float64] | None = None,
        held: int = HELD,
    ) -> None:
        self.candidates, self.targets, self.similarity = candidates, targets, similarity
        self.bonus = np.zeros(len(candidates)) if bonus is None else bonus
        self.covered = np.zeros(len(targets), dtype=np.float32)
        self.held = min(held, len(candidates))
        self.bounds = self._first_bounds()
        self._outside = (np.inf, -1)  # the greatest bound that is not held, and its lowest candidate
        self._hold: Ints = np.empty(0, dtype=np.int64)  # candidate of each slot
        self._slot = np.full(len(candidates), -1, dtype=np.int64)  # slot of each candidate
        self._columns: Floats = np.empty((0, len(targets)), dtype=np.float32)
        self._known: NDArray[np.float64] = np.empty(0)  # gain of each slot, or a bound where it is not fresh
        self._fresh: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def _first_bounds(self) -> NDArray[np.float64]:
        if self.held == len(self.candidates):
            return np.full(len(self.candidates), np.inf)  # all columns will be held: they tell
        sums = np.empty(len(self.candidates))
        for start, end in _steps(len(sums), len(self.targets)):
            block = self.similarity(self.candidates[start:end] @ self.targets.T)
            sums[start:end] = block.sum(axis=1, dtype=np.float64)
        # Columns are rounded to six decimals when they are held: a bound must not be below by that.
        return sums + 1e-6 * len(self.targets) + self.bonus

    def best(self) -> tuple[int, float] | None:
        while True:
            if len(self._hold):
                found = self._best_held()
                if found is not None:
                    return found
            if not self._rebuild():
                return None

    def _best_held(self) -> tuple[int, float] | None:
        """The best of the held candidates, where it is surely the best of all."""
        while True:
            slot = int(self._known.argmax())
            if self._known[slot] == -np.inf:
                return None
            if not self._fresh[slot]:
                self._known[slot] = self._gain(slot)
                self._fresh[slot] = True
                continue
            equal = np.flatnonzero(self._known == self._known[slot])
            if not self._fresh[equal].all():
                stale = equal[~self._fresh[equal]]
                self._known[stale] = [self._gain(int(other)) for other in stale]
                self._fresh[stale] = True
                continue
            candidate, gain = int(self._hold[equal].min()), float(self._known[slot])
            bound, index = self._outside
            return (candidate, gain) if gain > bound or (gain == bound and candidate < index) else None

    def _gain(self, slot: int) -> float:
        new = self._columns[slot] - self.covered
        np.maximum(new, 0, out=new)
        return float(new.sum(dtype=np.float64) + self.bonus[self._hold[slot]])

    def _rebuild(self) -> bool:
        """Holds the candidates with the greatest bounds; False where none is left."""
        self.bounds[self._hold] = self._known
        hold = top(self.bounds, self.held)
        hold = hold[self.bounds[hold] > -np.inf]
        if not len(hold):
            return False
        outside = self.bounds.copy()
        outside[hold] = -np.inf
        index = int(outside.argmax())
        self._outside = (float(outside[index]), index)
        if not len(self._hold):
            self._columns = np.empty((len(hold), len(self.targets)), dtype=np.float32)
            self._put(hold, np.arange(len(hold)))
        else:
            coming = hold[self._slot[hold] < 0]
            staying = np.zeros(len(self._hold), dtype=bool)
            staying[self._slot[hold[self._slot[hold] >= 0]]] = True
            self._put(coming, np.flatnonzero(~staying)[: len(coming)])
        return True

    def _put(self, candidates: Ints, slots: Ints) -> None:
        """Computes the columns of these candidates into these slots, whose former holders go."""
        if not len(self._hold):
            self._hold = candidates.copy()
            self._known, self._fresh = np.empty(len(slots)), np.zeros(len(slots), dtype=bool)
        self._slot[self._hold[slots]] = -1
        self._hold[slots] = candidates
        self._slot[candidates] = slots
        self._fresh[slots] = False
        self._known[slots] = self.bounds[candidates]
        for start, end in _steps(len(candidates), len(self.targets)):
            columns = self.similarity(np.round(self.candidates[candidates[start:end]] @ self.targets.T, 6))
            self._columns[slots[start:end]] = columns
            if self._known[slots[start]] == np.inf:  # no bound yet, and nothing is covered yet
                self._known[slots[start:end]] = (
                    columns.sum(axis=1, dtype=np.float64) + self.bonus[candidates[start:end]]
                )

    def take(self, candidate: int) -> None:
        np.maximum(self.covered, self._columns[self._slot[candidate]], out=self.covered)
        self._fresh[:] = False
        self.drop(candidate)

    def drop(self, candidate: int) -> None:
        self._known[self._slot[candidate]] = self.bounds[candidate] = -np.inf


def _steps(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Slices of `rows` rows, of about 16 MB of float32 each where a row has `width`."""
    step = max(1, _CELLS // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class GraphCoverage:
    """`neighbours` [n, k] are each row's nearest rows and `similarities` [n, k] theirs; other pairs count 0.

    Every row is its own neighbour at similarity 1. Memory O(n k).
    """

    def __init__(self, neighbours: Ints, similarities: Floats) -> None:
        rows = len(neighbours)
        targets = np.concatenate([np.repeat(np.arange(rows), neighbours.shape[1]), np.arange(rows)])
        candidates = np.concatenate([neighbours.ravel(), np.arange(rows)])
        values = np.concatenate([similarities.ravel(), np.ones(rows, dtype=np.float32)])
        # An approximate search pads with -1 what it did not find; itself a row is added once, whether found or not.
        real = (candidates >= 0) & (candidates != targets)
        real[-rows:] = True
        targets, candidates, values = targets[real], candidates[real], values[real]
        order = np.argsort(candidates, kind="stable")
        self._targets, self._values = targets[order].astype(np.int32), np.round(values[order], 6)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(candidates, minlength=rows))])
        self.covered = np.zeros(rows, dtype=np.float32)
        self._heap = [(-self._gain(row), row, 0) for row in range(rows)]
        heapq.heapify(self._heap)
        self._round = 0

    def _edges(self, row: int) -> slice:
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    def _gain(self, row: int) -> float:
        edges = self._edges(row)
        return float(np.maximum(self._values[edges] - self.covered[self._targets[edges]], 0).sum(dtype=np.float64))

    def best(self) -> tuple[int, float] | None:
        while self._heap:
            bound, row, when = self._heap[0]
            if when == self._round:
                return row, -bound
            heapq.heapreplace(self._heap, (-self._gain(row), row, self._round))
        return None

    def take(self, candidate: int) -> None:
        edges = self._edges(candidate)
        targets = self._targets[edges]
        self.covered[targets] = np.maximum(self.covered[targets], self._values[edges])
        self.drop(candidate)
        self._round += 1

    def drop(self, candidate: int) -> None:
        assert self._heap[0][1] == candidate
        heapq.heappop(self._heap)


def take_greedily(
    covers: Sequence[Cover], members: Sequence[Ints], meter: BudgetMeter
) -> tuple[list[int], list[float], list[int]]:
    """Greedy over blocks that do not touch one another: always the greatest gain of any block, until the meter is full.

    `members` give each block's pool rows, ascending. Rows that do not fit are dropped. Returns the pool rows taken,
    their gains, and their blocks; ties go to the lowest pool row.
    """
    heap: list[tuple[float, int, int, int]] = []

    def push(block: int) -> None:
        found = covers[block].best()
        if found is not None:
            heapq.heappush(heap, (-found[1], int(members[block][found[0]]), block, found[0]))

    for block in range(len(covers)):
        push(block)
    rows, gains, blocks = [], [], []
    while heap and not meter.full:
        negative, row, block, candidate = heapq.heappop(heap)
        if meter.take(row):
            covers[block].take(candidate)
            rows.append(row)
            gains.append(-negative)
            blocks.append(block)
        else:
            covers[block].drop(candidate)
        push(block)
    return rows, gains, blocks
