"""Farthest-first traversal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import fitting, needs_shots, similarities
from xpert.selectors._spreading import HELD, spread

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

FARTHEST = 2.0
"""The greatest cosine distance there is: the first row's score."""


@dataclass(frozen=True)
class KCenterOptions(Config):
    start: str = option(
        "auto",
        "the first row: the nearest to the shots' centroid (shots), the nearest to all rows (medoid), or auto: shots "
        "where there are any",
        choices=("auto", "shots", "medoid"),
    )


class KCenter:
    """Each next row is the one farthest from all rows taken before, so that no row is far from a taken one.

    embeddings [n, d], unit rows -> rows in the order taken. Score: cosine distance (1 - cos, 0 to 2) to the nearest
    earlier pick, never rising; the first row's is 2. Within twice the optimal radius in the euclidean metric.
    """

    Options: ClassVar[type[Config]] = KCenterOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = "time O(n b d) in few matrix products, memory O(n); b rows taken"
    source: ClassVar[str] = "Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5"

    block: int = HELD

    def __init__(self, options: KCenterOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        nearness, what = self._start(features, shots)
        first = int(np.where(fitting(meter, len(embeddings)), nearness, -np.inf).argmax())
        ones = np.ones(len(embeddings), dtype=np.float32)
        taken, values = spread(embeddings, ones, 1.0, first, meter, held=self.block)
        values[0] = FARTHEST
        reasons = [f"the row nearest to {what}"]
        reasons += [f"distance {value:.3f} to the nearest row taken before" for value in values[1:]]
        log = [
            {"step": "radius", "rows": count, "radius": round(values[count], 6)} for count in _doublings(len(values))
        ]
        return Selection(np.array(taken, dtype=np.int64), np.array(values, dtype=np.float32), reasons, log)

    def _start(self, features: Features, shots: Shots | None) -> tuple[NDArray[np.float32], str]:
        """How near each row [n] is to where the traversal starts, and what that is."""
        embeddings = features.embeddings()
        if self.options.start == "shots" or (self.options.start == "auto" and shots):
            needs_shots("kcenter start=shots", shots)
            centre, what = features.shot_embeddings().mean(axis=0, keepdims=True), "the shots' centroid"
        else:
            centre, what = embeddings.mean(axis=0, dtype=np.float64)[None].astype(np.float32), "all rows (the medoid)"
        return similarities(embeddings, centre)[:, 0], what


def _doublings(rows: int) -> list[int]:
    """1, 2, 4, ... below `rows`: the counts at which the log tells the radius left over."""
    return [1 << power for power in range(rows.bit_length()) if 1 << power < rows]


PLUGIN = KCenter
