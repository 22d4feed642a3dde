"""Taking rows in order while passing over near-repeats of those taken: what `kshot` and `deita` share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.protocols import Floats

__all__ = ["RepeatWalk"]


class RepeatWalk:
    """Takes rows in order, passing over those whose cosine with a kept one is above `tau`.

    `kept` are the rows taken; `repeats` maps each row passed over to the place in `kept` of the row it is most like.
    One matrix product per block of rows; the result is the plain loop's, whatever the block.

    Time O(m b d) for m rows walked and b kept; memory O(b d + block * b).
    """

    def __init__(self, embeddings: Floats, tau: float, block: int) -> None:
        self.embeddings, self.tau, self.block = embeddings, tau, block
        self.kept: list[int] = []
        self.repeats: dict[int, int] = {}  # passed-over row -> position of the kept row it repeats
        self._store = np.empty((0, embeddings.shape[1]), dtype=np.float32)

    def run(self, order: NDArray[np.int64], meter: BudgetMeter) -> None:
        for start in range(0, len(order), self.block):
            if meter.full:
                break
            self._block(order[start : start + self.block], meter)

    def _block(self, rows: NDArray[np.int64], meter: BudgetMeter) -> None:
        vectors = self.embeddings[rows]
        before = len(self.kept)
        nearest = np.full(len(rows), -np.inf, dtype=np.float32)
        which = np.zeros(len(rows), dtype=np.int64)
        if before:
            cosines = np.round(vectors @ self._store[:before].T, 6)
            which = cosines.argmax(axis=1)
            nearest = cosines[np.arange(len(rows)), which]
        within = np.round(vectors @ vectors.T, 6)
        for position, row in enumerate(rows.tolist()):
            if meter.full:
                return
            if nearest[position] > self.tau:
                self.repeats[row] = int(which[position])
            elif meter.take(row):
                self._keep(row)
                nearer = within[position] > nearest
                nearest[nearer] = within[position, nearer]
                which[nearer] = len(self.kept) - 1

    def _keep(self, row: int) -> None:
        if len(self.kept) == len(self._store):
            grown = np.empty((max(64, 2 * len(self._store)), self.embeddings.shape[1]), dtype=np.float32)
            grown[: len(self.kept)] = self._store[: len(self.kept)]
            self._store = grown
        self._store[len(self.kept)] = self.embeddings[row]
        self.kept.append(row)
