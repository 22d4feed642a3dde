"""Every scorer as a selector: the best rows by its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.config import Config
from xpert.protocols import Floats, Scorer, Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import needs_shots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xpert.features import Features

__all__ = ["NOT_SCORED", "best_first", "ranked"]

NOT_SCORED = "not scored: "


@cache
def ranked(scorer_class: type[Scorer]) -> type[Any]:
    """A selector class that takes the best rows by a scorer; it bears the scorer's words, options, cost and source.

    Rows that the scorer cannot score by rule come last, by the lowest index, and are taken only when nothing else is
    left; the log counts them, and goes on with what the scorer's own `log()` tells, where it has one.
    """

    class Ranked:
        Options: ClassVar[type[Config]] = scorer_class.Options
        needs: frozenset[str] = scorer_class.needs
        cost: ClassVar[str] = scorer_class.cost
        source: ClassVar[str] = scorer_class.source

        def __init__(self, options: Any) -> None:
            self.scorer: Scorer = scorer_class(options)
            # An option may take a need away (a scorer model of its own needs no base): the instance knows.
            self.needs = self.scorer.needs

        def select(
            self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator
        ) -> Selection:
            rows = len(features.pool)
            meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
            if "shots" in self.needs:
                needs_shots(scorer_class.__module__.rsplit(".", 1)[-1], shots, answers="answers" in self.needs)
            if "base" in self.needs:
                features.base()
            self.scorer.prepare(features, shots, rng)
            scores = np.asarray(self.scorer.score(np.arange(rows, dtype=np.int64)), dtype=np.float32)
            chosen = np.array(meter.walk(best_first(scores).tolist()), dtype=np.int64)
            known = np.isfinite(scores)
            told: Callable[[], Sequence[Mapping[str, Any]]] = getattr(self.scorer, "log", tuple)
            log = [{"step": "scores", "rows": int(known.sum()), "not scored": int((~known).sum())}, *told()]
            reasons = [
                self.scorer.explain(int(row)) if known[row] else NOT_SCORED + self.scorer.explain(int(row))
                for row in chosen
            ]
            # A row without a score stands below all others; Selection's scores are finite.
            least = float(scores[known].min()) if known.any() else 0.0
            return Selection(chosen, np.where(known[chosen], scores[chosen], least), reasons, log, scores)

    Ranked.__name__ = Ranked.__qualname__ = scorer_class.__name__
    Ranked.__module__ = scorer_class.__module__
    Ranked.__doc__ = scorer_class.__doc__
    return Ranked


def best_first(scores: Floats) -> NDArray[np.int64]:
    """All rows, greatest score first, ties by the lowest index, NaN last."""
    return np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable").astype(np.int64)
