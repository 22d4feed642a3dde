"""The random control: every row is as likely as any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.config import Config
from xpert.protocols import Selection
from xpert.records import Budget, Shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class RandomOptions(Config):
    pass


class Random:
    """A uniform sample without replacement: the control that every other method has to beat.

    n rows -> rows in the order drawn. Score: the row's draw in [0, 1), highest first; it says nothing of the row.
    """

    Options: ClassVar[type[Config]] = RandomOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = "time O(n log n), memory O(n)"
    source: ClassVar[str] = "simple random sampling"

    def __init__(self, options: RandomOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        rows = len(features.pool)
        meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
        draws = rng.random(rows)
        chosen = np.array(meter.walk(np.argsort(-draws, kind="stable").tolist()), dtype=np.int64)
        return Selection(chosen, draws[chosen].astype(np.float32), ["drawn at random"] * len(chosen))


PLUGIN = Random
