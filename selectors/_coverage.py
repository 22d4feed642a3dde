"""Facility location, f(S) = sum over targets of the greatest similarity with a taken row: its greedy step, exact.

Two forms with one face. `Coverage` knows all similarities (and holds the columns it needs); gains never rise as rows
are taken (f is submodular), so a gain computed earlier bounds what it is now: Minoux 1978, doi:10.1007/BFb0006528.
`GraphCoverage` knows those of a graph alone, and keeps all gains up to date.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.selectors._spreading import top

__all__ = ["HELD", "SIMILARITIES", "Cover", "Coverage", "GraphCoverage", "SquareCoverage", "take_greedily"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HELD = 1024
"""How many candidates' columns are held at once; results do not depend on it."""
_CELLS = 4_000_000
_TILE = 512
_RUN = 64
_EXACT_TERMS = 16
_WHOLE = 1e6
"""What a similarity of 1 counts where sums are exact."""

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
    up to date one by one, and others come in when their bounds are no longer below. A gain is first summed fast in
    float32, which with its margin is a bound; only where that bound is the greatest is it summed again in float64.
    Memory O(n + held t). `take` and `drop` are for the candidate that `best` gave last.
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
        self._heap: list[tuple[float, int]] = []  # (minus a bound, candidate) of each that is held
        self._round = 0  # how many were taken
        # For each candidate the round of its bound, doubled, and one more where the bound is the exact gain.
        self._when: list[int] = []
        self._padded = np.zeros(-(-len(targets) // _RUN) * _RUN, dtype=np.float32)
        self._new = self._padded[: len(targets)]
        self._ones = np.ones(_RUN, dtype=np.float32)

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
        heap, when, exact, screened = self._heap, self._when, 2 * self._round + 1, 2 * self._round
        while heap:
            negative, candidate = heap[0]
            known = when[candidate]
            if known == exact:  # of equal ones the heap gives the lowest
                bound, index = self._outside
                found = -negative > bound or (-negative == bound and candidate < index)
                return (candidate, -negative) if found else None
            if known == screened:
                value, when[candidate] = self._gain(candidate), exact
            else:
                # A bound from before that is lower stays: both are bounds.
                value, when[candidate] = min(-negative, self._at_most(candidate)), screened
            heapq.heapreplace(heap, (-value, candidate))
        return None

    def _uncovered(self, candidate: int) -> Floats:
        np.subtract(self._columns[self._slot[candidate]], self.covered, out=self._new)
        return np.maximum(self._new, 0, out=self._new)

    def _gain(self, candidate: int) -> float:
        return float(self._uncovered(candidate).sum(dtype=np.float64) + self.bonus[candidate])

    def _at_most(self, candidate: int) -> float:
        """The gain, and more by the most that float32 can lose in sums of _RUN terms, none below 0."""
        self._uncovered(candidate)
        fast = float((self._padded.reshape(-1, _RUN) @ self._ones).sum(dtype=np.float64))
        return fast * (1 + 6e-8 * (_RUN + 2)) + float(self.bonus[candidate]) + 1e-12

    def _rebuild(self) -> bool:
        """Holds the candidates with the greatest bounds; False where none is left."""
        for negative, candidate in self._heap:
            self.bounds[candidate] = -negative
        hold = top(self.bounds, self.held)
        hold = hold[self.bounds[hold] > -np.inf]
        if not len(hold):
            return False
        outside = self.bounds.copy()
        outside[hold] = -np.inf
        index = int(outside.argmax())
        self._outside = (float(outside[index]), index)
        if not len(self._hold):
            self._when = [-1] * len(self.candidates)
            self._columns = np.empty((len(hold), len(self.targets)), dtype=np.float32)
            self._hold = hold.copy()
            self._put(hold, np.arange(len(hold)))
        else:
            coming = hold[self._slot[hold] < 0]
            staying = np.zeros(len(self._hold), dtype=bool)
            staying[self._slot[hold[self._slot[hold] >= 0]]] = True
            self._put(coming, np.flatnonzero(~staying)[: len(coming)])
        self._heap = [(-bound, row) for bound, row in zip(self.bounds[hold].tolist(), hold.tolist(), strict=True)]
        heapq.heapify(self._heap)
        return True

    def _put(self, candidates: Ints, slots: Ints) -> None:
        """Computes the columns of these candidates into these slots, whose former holders go."""
        self._slot[self._hold[slots]] = -1
        self._hold[slots] = candidates
        self._slot[candidates] = slots
        for start, end in _steps(len(candidates), len(self.targets)):
            columns = _rounded(self.candidates[candidates[start:end]], self.targets, self.similarity)
            self._columns[slots[start:end]] = columns
        for start, end in _steps(len(candidates), len(self.targets)):
            if self.bounds[candidates[start]] == np.inf:  # no bound yet, and nothing is covered yet
                sums = self._columns[slots[start:end]].sum(axis=1, dtype=np.float64)
                self.bounds[candidates[start:end]] = sums + self.bonus[candidates[start:end]]
                for candidate in candidates[start:end].tolist():
                    self._when[candidate] = 2 * self._round + 1

    def take(self, candidate: int) -> None:
        np.maximum(self.covered, self._columns[self._slot[candidate]], out=self.covered)
        self._round += 1
        self.drop(candidate)

    def drop(self, candidate: int) -> None:
        assert self._heap[0][1] == candidate
        heapq.heappop(self._heap)
        self.bounds[candidate] = -np.inf


class SquareCoverage:
    """rows [n, d], unit, that cover one another: all n x n similarities are held, and all gains kept up to date.

    When a row is taken, a gain loses what it had from the targets that are covered better now, and of these there are
    few: about n / k at the k-th take, so b takes cost O(n^2 log b) and not O(n^2 b). Similarities are whole
    millionths, so every sum is exact, in float32 too as long as it has 16 terms. Memory 4 n^2 bytes.
    """

    def __init__(self, rows: Floats, similarity: Callable[[Floats], Floats]) -> None:
        self._similar = _square(rows, similarity)
        self.covered = np.zeros(len(rows), dtype=np.float32)
        self._known = np.empty((min(_EXACT_TERMS, len(rows)), len(rows)), dtype=np.float32)
        self._gains = np.empty(len(rows))
        for start, end in _steps(len(rows), len(rows)):
            self._gains[start:end] = self._similar[start:end].sum(axis=1, dtype=np.float64)

    def best(self) -> tuple[int, float] | None:
        row = int(self._gains.argmax())
        return None if self._gains[row] == -np.inf else (row, float(self._gains[row]) / _WHOLE)

    def take(self, candidate: int) -> None:
        targets = np.flatnonzero(self._similar[candidate] > self.covered)
        old, new = self.covered[targets], self._similar[candidate][targets]
        for start in range(0, len(targets), _EXACT_TERMS):
            part = slice(start, start + _EXACT_TERMS)
            known = self._known[: len(targets[part])]
            np.take(self._similar, targets[part], axis=0, out=known, mode="clip")
            np.maximum(known, old[part, None], out=known)
            np.minimum(known, new[part, None], out=known)
            self._gains -= np.ones(len(known), np.float32) @ known
        # What lies below the old cover was clipped up to it, and is no loss.
        self._gains += old.sum(dtype=np.float64)
        self.covered[targets] = new
        self.drop(candidate)

    def drop(self, candidate: int) -> None:
        self._gains[candidate] = -np.inf


def _square(rows: Floats, similarity: Callable[[Floats], Floats]) -> Floats:
    """All similarities [n, n] in whole millionths: half of them is computed, the other half is their mirror."""
    similar = np.empty((len(rows), len(rows)), dtype=np.float32)
    for start in range(0, len(rows), _TILE):
        low = slice(start, start + _TILE)
        for left in range(start, len(rows), _TILE):
            right = slice(left, left + _TILE)
            tile = similarity(rows[low] @ rows[right].T)
            np.multiply(tile, np.float32(_WHOLE), out=tile)
            np.rint(tile, out=tile)
            if left > start:
                similar[right, low] = tile.T
            else:
                tile = np.triu(tile) + np.triu(tile, 1).T  # a product need not be symmetric in its last bit
            similar[low, right] = tile
    return similar


def _rounded(rows: Floats, others: Floats, similarity: Callable[[Floats], Floats]) -> Floats:
    """Similarities of rows [a, d] and others [b, d], the cosines to six decimals: how a product is cut into blocks
    must not show in the results."""
    cosines: Floats = rows @ others.T
    np.round(cosines, 6, out=cosines)
    return similarity(cosines)


def _steps(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Slices of `rows` rows, of about 16 MB of float32 each where a row has `width`."""
    step = max(1, _CELLS // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class GraphCoverage:
    """Targets 0..n-1 know some of the candidates 0..n-1; a pair that is not in the graph counts `floor` [n] or less.

    The lists of the targets lie one after another: target t knows `candidates[starts[t]:starts[t + 1]]` at
    `similarities[...]`, no candidate twice. The gain of a row is what its targets have above what covers them, and
    at the start `floor` does. Similarities are counted in whole millionths, so sums are exact and ties are ties.
    All gains are kept up to date: a take costs the lists of the targets that it covers better, and one pass over
    the n gains. Memory O(edges).
    """

    def __init__(self, starts: Ints, candidates: NDArray[np.integer], similarities: Floats, floor: Floats) -> None:
        from scipy.sparse import csr_matrix

        rows = len(starts) - 1
        self._starts, self._candidates = starts, candidates.astype(np.int32, copy=False)
        self._values = np.rint(similarities * np.float32(_WHOLE))  # below 2**24: float32 holds them exactly
        self.covered = np.rint(floor * np.float32(_WHOLE))
        self._by_candidate = csr_matrix((self._values, self._candidates, starts), shape=(rows, rows)).tocsc()
        columns = self._by_candidate
        above = np.maximum(columns.data - self.covered[columns.indices], 0)
        of = np.repeat(np.arange(rows), np.diff(columns.indptr))
        self._gains = np.bincount(of, weights=above, minlength=rows).astype(np.float64)

    @classmethod
    def of_neighbours(cls, neighbours: Ints, similarities: Floats) -> GraphCoverage:
        """neighbours [n, k], each row's nearest rows, and similarities [n, k] theirs; other pairs count 0.

        Every row is its own neighbour at similarity 1, found or not; -1 stands where a search found nothing.
        """
        rows = len(neighbours)
        itself = np.arange(rows)[:, None]
        candidates = np.concatenate([itself, neighbours], axis=1)
        values = np.concatenate([np.ones((rows, 1), np.float32), similarities], axis=1)
        real = (candidates >= 0) & (candidates != itself)
        real[:, 0] = True
        starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))])
        return cls(starts, candidates[real], values[real].astype(np.float32), np.zeros(rows, np.float32))

    def best(self) -> tuple[int, float] | None:
        row = int(self._gains.argmax())
        return None if self._gains[row] == -np.inf else (row, float(self._gains[row]) / _WHOLE)

    def take(self, candidate: int) -> None:
        own = slice(self._by_candidate.indptr[candidate], self._by_candidate.indptr[candidate + 1])
        targets, values = self._by_candidate.indices[own], self._by_candidate.data[own]
        better = values > self.covered[targets]
        targets, values = targets[better], values[better]
        starts, sizes = self._starts[targets], self._starts[targets + 1] - self._starts[targets]
        edges = np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        known = self._values[edges]
        lost = np.maximum(known - np.repeat(self.covered[targets], sizes), 0)
        lost -= np.maximum(known - np.repeat(values, sizes), 0)
        np.subtract.at(self._gains, self._candidates[edges], lost.astype(np.float64))
        self.covered[targets] = values
        self.drop(candidate)

    def drop(self, candidate: int) -> None:
        self._gains[candidate] = -np.inf


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
