"""Cluster-balanced sampling by quality."""

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
from xpert.selectors._anchors import nearest_shots, needs_shots
from xpert.selectors._drawing import draw, spend

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class KMQOptions(Config):
    quality: str = option(
        "uniform",
        "chance of a row inside its cluster: all alike (uniform), by its greatest cosine with a shot (shots), by its "
        "answer's length (length), or by a column of the pool (column)",
        choices=("uniform", "shots", "length", "column"),
    )
    quality_column: str | None = option(None, "the column that holds each row's quality, a number from 0")
    share: str = option(
        "size", "what a cluster is given: in proportion to its rows (size), or alike (equal)", choices=("size", "equal")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.quality == "column") != (self.quality_column is not None):
            raise BadInput("quality=column and quality-column=NAME go together")


class KMQ:
    """Every cluster gets its share of the budget; inside it, rows are drawn with chances in proportion to quality.

    labels [n], quality [n] -> rows, ordered so that every beginning of the list keeps the clusters' shares. Shares
    are rounded by largest remainder and never exceed a cluster; drawing is without replacement. Score: the row's
    quality; rows of quality 0 are drawn only when a cluster has no others. Of a token budget each cluster gets tokens,
    and what is left over in the clusters is spent on rows that still fit, in the order drawn. For the method's
    iterations see `kmq-iterative`.
    """

    Options: ClassVar[type[Config]] = KMQOptions
    needs: ClassVar[frozenset[str]] = frozenset({"clusters"})
    cost: ClassVar[str] = "time O(n log n) after clustering, memory O(n)"
    source: ClassVar[str] = "Diversify and Conquer, arXiv:2409.11378; draws by Efraimidis and Spirakis 2006"

    def __init__(self, options: KMQOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        labels = np.asarray(features.clusters().labels, dtype=np.int64)
        meter = BudgetMeter.of(budget, len(labels), features.lengths() if budget.in_tokens else None)
        quality = self._quality(features, shots)
        order = draw(quality, rng)
        quotas = self._quotas(labels, meter)
        rows, places = spend(order, labels, quotas, meter)
        chosen = np.array(rows, dtype=np.int64)[np.lexsort((rows, places))]
        reasons = [f"cluster {labels[row]}, quality {quality[row]:.4g}" for row in chosen]
        taken = np.bincount(labels[chosen], minlength=len(quotas))
        unit = "tokens" if budget.in_tokens else "rows"
        log = [
            {
                "step": "cluster",
                "cluster": cluster,
                "quota": int(quota),
                "unit": unit,
                "taken rows": int(taken[cluster]),
            }
            for cluster, quota in enumerate(quotas)
        ]
        return Selection(chosen, quality[chosen].astype(np.float32), reasons, log)

    def _quotas(self, labels: Ints, meter: BudgetMeter) -> Ints:
        """What each cluster [k] may spend, in rows or tokens."""
        sizes = np.bincount(labels)
        costs = sizes if meter.costs is None else np.bincount(labels, weights=meter.costs).astype(np.int64)
        weights = sizes if self.options.share == "size" else (sizes > 0)
        return allocate(weights.astype(np.float64), costs.astype(np.int64), meter.limit)

    def _quality(self, features: Features, shots: Shots | None) -> NDArray[np.float64]:
        rows = len(features.pool)
        match self.options.quality:
            case "shots":
                needs_shots("kmq quality=shots", shots)
                return np.maximum(nearest_shots(features)[0], 0).astype(np.float64)
            case "length":
                return features.lengths().astype(np.float64)
            case "column":
                assert self.options.quality_column is not None
                return _column(features, self.options.quality_column)
        return np.ones(rows)


def _column(features: Features, name: str) -> NDArray[np.float64]:
    """A column of the pool's own rows as numbers [n]; raises BadInput naming the first row that has none."""
    values = np.empty(len(features.pool))
    for index, row in enumerate(features.pool):
        value = row.columns.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            said = f"holds {value!r}" if name in row.columns else "is missing"
            raise BadInput(f"quality column {name!r} {said}; a number from 0 is needed", where=f"pool row {row.id}")
        values[index] = value
    return values


PLUGIN = KMQ
