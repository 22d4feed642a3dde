"""Maximal marginal relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import describe_shot, fitting, nearest_shots, needs_shots
from xpert.selectors._spreading import spread

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class MMROptions(Config):
    relevance: float = option(
        0.7, "weight of the likeness to the shots; the rest weighs against likeness to rows taken", minimum=0, maximum=1
    )


class MMR:
    """Rows like the shots and unlike the rows taken before, by one weighted sum.

    embeddings [n, d], shots [K, d], unit rows -> rows in the order taken; each is the one with the greatest
    w * (greatest cosine with any shot) - (1 - w) * (greatest cosine with any row taken before), w being `relevance`.
    Score: that value when it was taken; the first row has nothing taken before it. Exact, not approximated.
    """

    Options: ClassVar[type[Config]] = MMROptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "embeddings"})
    cost: ClassVar[str] = "time O(n K d + n b d) in few matrix products, memory O(n K); b rows taken"
    source: ClassVar[str] = "Carbonell and Goldstein 1998, doi:10.1145/290941.291025"

    block: int = 1024

    def __init__(self, options: MMROptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        shots = needs_shots("mmr", shots)
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        cosines, nearest = nearest_shots(features)
        relevance = np.float32(self.options.relevance) * cosines
        first = int(np.where(fitting(meter, len(embeddings)), relevance, -np.inf).argmax())
        taken, values = spread(embeddings, relevance, 1 - self.options.relevance, first, meter, held=self.block)
        describe = describe_shot(shots)
        reasons = [describe(int(nearest[row]), float(cosines[row])) for row in taken]
        if self.options.relevance < 1:
            for position in range(1, len(taken)):
                likeness = (float(relevance[taken[position]]) - values[position]) / (1 - self.options.relevance)
                reasons[position] += f"; at most {likeness:.3f} to rows taken before"
        return Selection(np.array(taken, dtype=np.int64), np.array(values, dtype=np.float32), reasons, (), relevance)


PLUGIN = MMR
