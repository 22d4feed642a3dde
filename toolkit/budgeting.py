"""Spending a budget exactly: a meter that rows are taken against, and shares of a total under caps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.records import Budget

__all__ = ["BudgetMeter", "allocate"]

Ints = NDArray[np.int64]


class BudgetMeter:
    """Rows are taken until the budget is spent: never more, and never less while another row would fit.

    `costs` [n] int64 are supervised tokens per row, or None where every row costs one. A row that does not fit now
    never fits later, so a selector may forget it; it walks on until `full`.
    """

    def __init__(self, limit: int, costs: Ints | None = None) -> None:
        self.limit = limit
        self.costs = costs
        self.spent = 0
        self._taken: set[int] = set()
        self._cheapest = None if costs is None else np.argsort(costs, kind="stable")
        self._next_cheapest = 0

    @classmethod
    def of(cls, budget: Budget, pool_rows: int, lengths: Ints | None = None) -> BudgetMeter:
        """The meter of a budget for a pool; `lengths` [n] are read for a token budget alone.

        Raises BadInput where the budget exceeds the pool, or no row is short enough for it.
        """
        if not budget.in_tokens:
            return cls(budget.limit(pool_rows))
        if lengths is None:
            raise ValueError("a token budget needs the rows' lengths")
        meter = cls(budget.limit(pool_rows, int(lengths.sum())), lengths)
        if meter.full:
            shortest = int(lengths.min())
            raise BadInput(
                f"the budget of {meter.limit:,} tokens is less than the shortest row ({shortest:,} tokens)",
                hint="raise --budget",
            )
        return meter

    @property
    def left(self) -> int:
        return self.limit - self.spent

    def cost(self, row: int) -> int:
        return 1 if self.costs is None else int(self.costs[row])

    def fits(self, row: int) -> bool:
        return self.cost(row) <= self.left

    def take(self, row: int) -> bool:
        """Takes the row where it fits, and says whether it did. A row can be taken once."""
        if row in self._taken:
            raise ValueError(f"row {row} was taken before")
        if not self.fits(row):
            return False
        self._taken.add(row)
        self.spent += self.cost(row)
        return True

    def took(self, row: int) -> bool:
        return row in self._taken

    @property
    def taken(self) -> int:
        """How many rows were taken."""
        return len(self._taken)

    @property
    def full(self) -> bool:
        """No row that is still to be had would fit."""
        if self.costs is None or self._cheapest is None:
            return self.left <= 0
        while self._next_cheapest < len(self._cheapest) and int(self._cheapest[self._next_cheapest]) in self._taken:
            self._next_cheapest += 1
        if self._next_cheapest == len(self._cheapest):
            return True
        return int(self.costs[self._cheapest[self._next_cheapest]]) > self.left

    def walk(self, order: Iterable[int]) -> list[int]:
        """Takes what fits of `order`, first to last, skipping rows taken before; the rows it took."""
        took = []
        for row in order:
            if self.full:
                break
            if row not in self._taken and self.take(int(row)):
                took.append(int(row))
        return took


def allocate(weights: NDArray[np.floating], caps: Ints, total: int) -> Ints:
    """Whole shares of `total` in proportion to `weights`, none above its cap; their sum is min(total, sum of caps).

    weights [k] >= 0, caps [k] int64 -> int64 [k]. Clusters whose share would pass their cap are filled and closed,
    and the rest is shared anew among the open ones; fractions go to the largest remainders (ties: lowest index).
    Weightless clusters are given something only once all others are full. Time O(k^2) at worst.
    """
    weights = np.asarray(weights, dtype=np.float64)
    caps = np.asarray(caps, dtype=np.int64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError("weights are finite and not negative")
    shares = np.zeros(len(caps), dtype=np.int64)
    remaining = int(min(total, caps.sum()))
    open_ = caps > 0
    while remaining > 0:
        active = open_ & (weights > 0)
        # Only weightless clusters are left: they share alike.
        effective = np.where(active, weights, 0.0) if active.any() else open_.astype(np.float64)
        ideal = remaining * (effective / effective.sum())
        over = open_ & (effective > 0) & (ideal >= caps)
        if over.any():
            shares[over] = caps[over]
            remaining -= int(caps[over].sum())
            open_ &= ~over
            continue
        floor = np.floor(ideal).astype(np.int64)
        rest = remaining - int(floor.sum())
        fraction = np.where(effective > 0, ideal - floor, -1.0)
        floor[np.argsort(-fraction, kind="stable")[:rest]] += 1
        shares[open_] = floor[open_]
        break
    return shares
