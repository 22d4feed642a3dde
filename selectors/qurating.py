"""Rows drawn by a rating that is learned from pairwise judgements, at a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter, allocate
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._gumbel import gumbel_order
from xpert.selectors._scaling import standardised
from xpert.selectors.scorers.qurating import QuRating, QuRatingOptions

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class QuRatingDrawOptions(QuRatingOptions):
    tau: float = option(
        2.0, "temperature of the draw: 0 takes the best rated, a great one any row as likely as another", minimum=0
    )
    domain: str | None = option(
        None, "a column of the pool; each of its values keeps its share of the pool, and rows are drawn inside it"
    )


class QuRatingDraw:
    """Rows drawn without replacement with chances in proportion to exp(z / tau), z being the standardised rating.

    The rating is the scorer `qurating` (see `xpert methods qurating --kind scorer`): a Bradley-Terry model of pairwise
    judgements. ratings [n] -> rows in the order drawn (Gumbel top-k), until the row or token budget is spent. Drawing
    keeps the variety that taking the best rated loses. With `domain` every value of a column gets its own share of the
    budget, in rows or tokens, rounded by largest remainder; what is left over is spent on rows that still fit. Score:
    the rating.
    """

    Options: ClassVar[type[Config]] = QuRatingDrawOptions
    needs: ClassVar[frozenset[str]] = QuRating.needs
    cost: ClassVar[str] = QuRating.cost + "; the draw O(n log n)"
    source: ClassVar[str] = QuRating.source

    def __init__(self, options: QuRatingDrawOptions) -> None:
        self.options = options
        self.scorer = QuRating(options)

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        rows = len(features.pool)
        meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
        domains = _domains(features, self.options.domain) if self.options.domain else None
        self.scorer.prepare(features, shots, rng)
        ratings = self.scorer.score(np.arange(rows, dtype=np.int64))
        z = standardised(ratings)
        order = gumbel_order(z, self.options.tau, rng)
        log = list(self.scorer.log())
        if domains is None:
            chosen = np.array(meter.walk(order.tolist()), dtype=np.int64)
        else:
            names, labels = domains
            quotas = _quotas(labels, len(names), meter)
            chosen = _spend(order, labels, quotas, meter)
            taken = np.bincount(labels[chosen], minlength=len(names))
            unit = "tokens" if budget.in_tokens else "rows"
            log += [
                {"step": "domain", "domain": name, "quota": int(quota), "unit": unit, "taken rows": int(count)}
                for name, quota, count in zip(names, quotas, taken, strict=True)
            ]
        how = f"drawn at tau {self.options.tau:g}" if self.options.tau > 0 else "best rated"
        reasons = [f"{self.scorer.explain(row)} (z {z[row]:+.2f}), {how}" for row in chosen.tolist()]
        return Selection(chosen, ratings[chosen], reasons, log, ratings)


def _domains(features: Features, column: str) -> tuple[list[str], Ints]:
    """The values of a column, sorted, and the index [n] of each row's; raises BadInput for a row that has none."""
    values = []
    for row in features.pool:
        value = row.columns.get(column, row.skill if column == "skill" else None)
        if value is None or isinstance(value, list | dict):
            said = "is missing" if value is None else f"holds {value!r}"
            raise BadInput(f"domain column {column!r} {said}", where=f"pool row {row.id}")
        values.append(str(value))
    names, labels = np.unique(np.array(values, dtype=object).astype(str), return_inverse=True)
    return names.tolist(), labels.astype(np.int64)


def _quotas(labels: Ints, count: int, meter: BudgetMeter) -> Ints:
    """What each domain [k] may spend, in rows or tokens: its share of the pool's."""
    costs = np.bincount(labels, weights=meter.costs, minlength=count).astype(np.int64)
    return allocate(costs.astype(np.float64), costs, meter.limit)


def _spend(order: Ints, labels: Ints, quotas: Ints, meter: BudgetMeter) -> Ints:
    """The rows taken, in their order: inside the quotas first, then what still fits the budget."""
    left = quotas.astype(np.int64)
    taken = []
    for row in order.tolist():
        cost = meter.cost(row)
        if cost <= left[labels[row]] and meter.take(row):
            left[labels[row]] -= cost
            taken.append(row)
    taken += meter.walk(order.tolist())
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    chosen = np.array(taken, dtype=np.int64)
    return chosen[np.argsort(place[chosen])]


PLUGIN = QuRatingDraw
