"""Complex requests with good answers, near-repeats passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Floats, Scorer, Selection
from xpert.records import Budget, Shots
from xpert.selectors._ranked import NOT_SCORED, best_first
from xpert.selectors._repeats import RepeatWalk
from xpert.selectors._scoring import check_scorer, prepared_scorer, scorer_settings

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class DeitaOptions(Config):
    complexity: str = option("deita-complexity", "the scorer of complexity, by name")
    complexity_params: str = option("", "its parameters, such as scorer-model=FOLDER")
    quality: str = option("deita-quality", "the scorer of quality, by name")
    quality_params: str = option("", "its parameters")
    threshold: float = option(
        0.9, "cosine with a row taken before above which a row is passed over", minimum=-1, maximum=1
    )
    refill: bool = option(True, "bring rows passed over back, best first, where the budget is not spent without them")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self.complexity, self.complexity_params)
        check_scorer(self.quality, self.quality_params)

    def to_dict(self) -> dict[str, Any]:
        """With the scorers' own settings, which may hold the content of a file."""
        named = {
            "complexity_options": scorer_settings(self.complexity, self.complexity_params),
            "quality_options": scorer_settings(self.quality, self.quality_params),
        }
        return {**super().to_dict(), **named}


class Deita:
    """Rows in the order of evol = complexity * quality, each taken unless it is too like one taken before.

    embeddings [n, d] unit rows, evol [n] -> rows in the order taken, then repeats brought back. With the two scorers of
    Deita evol is the sum over turns of complexity times quality, else the product of the rows' scores, which must not
    be negative. A row is taken where its greatest cosine with the rows taken is at most `threshold` (the paper calls
    the threshold a distance; it is a similarity). Score: evol. Rows that a scorer cannot score come last. The sequence
    is the plain loop's.
    """

    Options: ClassVar[type[Config]] = DeitaOptions
    needs: frozenset[str] = frozenset({"embeddings", "base"})
    cost: ClassVar[str] = "the scorers (two forward passes a turn), then time O(m b d); m rows walked for b taken"
    source: ClassVar[str] = "Liu et al. 2024, arXiv:2312.15685"

    block: int = 512

    def __init__(self, options: DeitaOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        rows = len(features.pool)
        meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
        options = self.options
        scorers = [
            prepared_scorer(name, params, features, shots, rng)
            for name, params in (
                (options.complexity, options.complexity_params),
                (options.quality, options.quality_params),
            )
        ]
        evol = _evol(scorers, features, (options.complexity, options.quality))
        walk = RepeatWalk(features.embeddings(), options.threshold, self.block)
        walk.run(best_first(evol), meter)
        back = meter.walk(walk.repeats) if options.refill else []
        chosen = np.array([*walk.kept, *back], dtype=np.int64)
        reasons = [_reason(scorers, evol, int(row)) for row in chosen]
        for position, row in enumerate(back, start=len(walk.kept)):
            reasons[position] += f"; like the row of rank {walk.repeats[row] + 1}, brought back"
        known = np.isfinite(evol)
        least = float(evol[known].min()) if known.any() else 0.0
        counts = {"passed over": len(walk.repeats), "brought back": len(back), "not scored": int((~known).sum())}
        log: list[Mapping[str, Any]] = [{"step": "repeats", **counts}]
        for scorer in scorers:
            log += _told(scorer)
        return Selection(chosen, np.where(known, evol, least)[chosen].astype(np.float32), reasons, log, evol)


def _evol(scorers: Sequence[Scorer], features: Features, names: tuple[str, str]) -> Floats:
    """float32 [n]: complexity times quality, turn by turn where both scorers rate turns; NaN where one has no score."""
    rows: NDArray[np.int64] = np.arange(len(features.pool), dtype=np.int64)
    by_turn = [getattr(scorer, "turn_ratings", None) for scorer in scorers]
    if all(by_turn):
        complexity, quality = (rate(rows) for rate in by_turn if rate is not None)
        return np.asarray(np.nansum(complexity * quality, axis=1), np.float32)
    complexity, quality = (np.asarray(scorer.score(rows), np.float32) for scorer in scorers)
    for name, values in zip(names, (complexity, quality), strict=True):
        below = np.flatnonzero(values < 0)
        if len(below):
            row = features.pool.row(int(below[0]))
            raise BadInput(
                f"scorer {name} gives {values[below[0]]:.4g} for row {row.id}; a product needs scores from 0 up",
                hint="take another scorer, or another order of it",
            )
    return complexity * quality


def _reason(scorers: Sequence[Scorer], evol: Floats, row: int) -> str:
    parts = ", ".join(scorer.explain(row) for scorer in scorers)
    return f"evol {evol[row]:.4g}: {parts}" if np.isfinite(evol[row]) else NOT_SCORED + parts


def _told(scorer: Scorer) -> Sequence[Mapping[str, Any]]:
    log = getattr(scorer, "log", None)
    return list(log()) if log is not None else []


PLUGIN = Deita
