"""What the influence scorers share: a row counts by its best group of shots, whatever the pass that scores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats, RowPass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xpert.features import Features

__all__ = ["GroupScores"]


class GroupScores:
    """Scores of rows by a pass with arrays `scores` [G] a row and, to `normalise` by it, `norm`."""

    def __init__(self, features: Features, row_pass: RowPass, names: Sequence[str], *, normalise: bool) -> None:
        self.row_pass = row_pass
        self._features = features
        self._names = names
        self._normalise = normalise
        self._known: dict[int, tuple[float, int]] = {}

    def score(self, rows: NDArray[np.int64]) -> Floats:
        """float32 [m]: each row's greatest score with any group; NaN where its prompt leaves no room for an answer."""
        found = self._features.compute(self.row_pass, rows)
        each = np.array(found["scores"], np.float32)
        if self._normalise:
            each /= np.maximum(found["norm"], np.finfo(np.float32).tiny)[:, None]
        best = each.argmax(axis=1)
        scores = np.asarray(each[np.arange(len(rows)), best], np.float32)
        self._known.update(zip(rows.tolist(), zip(scores.tolist(), best.tolist(), strict=True), strict=True))
        return scores

    def explain(self, row: int) -> str:
        score, group = self._known[row]
        if not np.isfinite(score):
            return "its prompt leaves no room for the answer"
        return f"influence {score:.3g}" + (f" on {self._names[group]}" if len(self._names) > 1 else "")
