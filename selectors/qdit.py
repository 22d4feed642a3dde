"""QDIT: quality and coverage of the pool in one weighted sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.protocols import Floats, Selection
from xpert.records import Budget, Shots
from xpert.selectors._coverage import HELD, SIMILARITIES, Coverage, take_greedily
from xpert.selectors._scaling import scaled
from xpert.selectors._scoring import check_scorer, prepared_scorer, scorer_settings
from xpert.similarity import similarity_blocks

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class QDITOptions(Config):
    quality: str = option("length", "the scorer whose values are the quality")
    quality_params: str = option("", "parameters of that scorer, as KEY=VALUE,KEY=VALUE")
    alpha: float = option(0.5, "weight of quality; 1 - alpha is that of coverage", minimum=0, maximum=1)
    similarity: str = option(
        "clip", "clip: max(cos, 0); shifted: (1 + cos) / 2, which favours central rows", choices=tuple(SIMILARITIES)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self.quality, self.quality_params)

    def to_dict(self) -> dict[str, Any]:
        """With the scorer's own settings, which may hold the content of a file."""
        return {**super().to_dict(), "quality_options": scorer_settings(self.quality, self.quality_params)}


class QDIT:
    """Always the row with the greatest (1 - alpha) * its gain in coverage + alpha * its quality.

    embeddings [n, d], unit rows, quality [n] by any scorer -> rows in the order taken. Coverage is facility location
    over the whole pool. Both are scaled to 0..1: quality by its least and greatest value over the pool, gains by those
    of the first step; so the sum stays submodular, and the lazy greedy is the plain one. (Scaling anew in each step
    would raise small gains late.) Rows that the scorer cannot score count as the worst. Score: that sum.

    alpha=0 is `facility` in mode exact; alpha=1 takes the best by quality.
    """

    Options: ClassVar[type[Config]] = QDITOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings", "lengths"})
    cost: ClassVar[str] = "the scorer on all rows, and time O(n^2 d) (minutes from 50,000 rows), memory 256 MB + O(n)"
    source: ClassVar[str] = "Data Diversity Matters for Robust Instruction Tuning, arXiv:2311.14736"

    block: int = HELD

    def __init__(self, options: QDITOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        everything = np.arange(len(embeddings), dtype=np.int64)
        scorer = prepared_scorer(self.options.quality, self.options.quality_params, features, shots, rng)
        scores = scorer.score(everything)
        quality = scaled(scores)
        log = [{"step": "quality", "scorer": self.options.quality, "not scored": int(np.isnan(scores).sum())}]
        alpha = self.options.alpha
        if alpha == 1:
            rows = meter.walk(np.argsort(-quality, kind="stable").tolist())
            reasons = [f"quality {quality[row]:.3f} ({scorer.explain(row)})" for row in rows]
            return Selection(np.array(rows, np.int64), quality[rows].astype(np.float32), reasons, log)
        least, spread = self._first_gains(embeddings)
        cover = Coverage(
            embeddings,
            embeddings,
            SIMILARITIES[self.options.similarity],
            bonus=alpha / (1 - alpha) * spread * quality,
            held=max(self.block, 2**26 // len(embeddings)),
        )
        rows, sums, _ = take_greedily([cover], [everything], meter)
        values = (1 - alpha) / spread * (np.array(sums) - least)
        gains = (values - alpha * quality[rows]) / (1 - alpha)
        reasons = [
            f"quality {quality[row]:.3f} ({scorer.explain(row)}), gain in coverage {gain:.3f}"
            for row, gain in zip(rows, gains, strict=True)
        ]
        return Selection(np.array(rows, dtype=np.int64), values.astype(np.float32), reasons, log)

    def _first_gains(self, embeddings: Floats) -> tuple[float, float]:
        """The least gain of any row over an empty set, and how far the greatest is above it (1 if not at all)."""
        similarity = SIMILARITIES[self.options.similarity]
        sums = np.empty(len(embeddings))
        for start, block in similarity_blocks(embeddings, embeddings):
            sums[start : start + len(block)] = similarity(block).sum(axis=1, dtype=np.float64)
        sums = np.round(sums, 4)
        least, spread = float(sums.min()), float(sums.max() - sums.min())
        return least, spread if spread > 0 else 1.0


PLUGIN = QDIT
