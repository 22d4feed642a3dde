"""Drawing rows with unequal chances, and spending quotas on them: what the balanced selectors share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter

__all__ = ["draw", "spend"]

Ints = NDArray[np.int64]


def draw(quality: NDArray[np.float64], rng: np.random.Generator) -> Ints:
    """All rows [n] in the order of successive draws with chances in proportion to quality; those of quality 0 last."""
    waits = rng.exponential(size=len(quality)) / np.where(quality > 0, quality, 1.0)
    return np.lexsort((waits, quality <= 0))


def spend(
    order: Ints, labels: Ints, quotas: Ints, meter: BudgetMeter, *, fill: bool = True
) -> tuple[list[int], list[float]]:
    """Rows within the quotas first, then, to `fill` the budget, what still fits; with each row's place in its quota.

    `order` holds rows not taken before; quotas [k] are in what the meter counts; places are 0 to 1, and 1 and more for
    rows beyond the quotas.
    """
    left = quotas.astype(np.int64)
    rows: list[int] = []
    places: list[float] = []
    for row in order.tolist():
        cluster, cost = labels[row], meter.cost(row)
        if cost <= left[cluster] and meter.take(row):
            rows.append(row)
            places.append((quotas[cluster] - left[cluster] + cost / 2) / quotas[cluster])
            left[cluster] -= cost
    rest = meter.walk(order.tolist()) if fill else []
    return rows + rest, places + [1.0 + place for place in range(len(rest))]
