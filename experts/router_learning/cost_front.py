"""What quality costs: the choices that a router with predicted losses makes as the weight of the cost grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FrontPoint", "cost_front", "turning_points"]

Floats64 = NDArray[np.float64]


@dataclass(frozen=True)
class FrontPoint:
    """At `weight` the prompts' choices have this mean observed loss and mean cost; shares [m]: of the choices."""

    weight: float
    loss: float
    cost: float
    shares: tuple[float, ...]


def cost_front(predicted: Floats64, observed: Floats64, costs: Floats64, *, points: int = 64) -> list[FrontPoint]:
    """The Pareto front of (mean observed loss, mean cost) over the weights lambda of the cost, cheapest last.

    predicted and observed [n, m] are losses of m subjects on n prompts, costs [m] >= 0 what each subject costs. At a
    weight a prompt goes to argmin of predicted + weight * cost, of equals to the cheapest. Choices change at the
    turning points alone, so that one weight between each two of them tries all choices there are; where there are more
    than `points` of those, so many are taken evenly. Predictions err: a choice that another one matches or beats in
    observed loss and cost is left out. Source: the sweep of Tryage, https://arxiv.org/abs/2308.11601.
    Time O(n m^2 + points n m).
    """
    n, m = predicted.shape
    if observed.shape != (n, m) or costs.shape != (m,):
        raise ValueError(f"losses {predicted.shape} and {observed.shape} and costs {costs.shape} do not fit")
    by_cost = np.argsort(costs, kind="stable")
    tried: dict[bytes, FrontPoint] = {}
    for weight in _between(turning_points(predicted, costs), points):
        objective = np.round(predicted[:, by_cost] + weight * costs[by_cost], 12)
        choice = by_cost[objective.argmin(axis=1)]
        shares = np.bincount(choice, minlength=m) / n
        point = FrontPoint(
            float(weight),
            float(observed[np.arange(n), choice].mean()),
            float(costs[choice].mean()),
            tuple(float(share) for share in shares),
        )
        tried.setdefault(choice.tobytes(), point)
    return _undominated(list(tried.values()))


def turning_points(predicted: Floats64, costs: Floats64) -> Floats64:
    """The weights above 0, ascending, at which some prompt's choice changes: the corners of each prompt's lower
    envelope of the lines predicted[m] + weight * costs[m]."""
    corners: set[float] = set()
    for row in predicted:
        weight = 0.0
        cost = costs[np.lexsort((costs, row))[0]]
        loss = row.min()
        while True:
            cheaper = np.flatnonzero(costs < cost)
            if not len(cheaper):
                break
            at = (row[cheaper] - loss) / (cost - costs[cheaper])  # where each of them becomes as good
            best = cheaper[np.lexsort((costs[cheaper], at))[0]]
            weight = max(weight, float(at.min()))
            if weight > 0:
                corners.add(weight)
            cost, loss = costs[best], row[best]
    return np.array(sorted(corners))


def _between(corners: Floats64, points: int) -> Floats64:
    """0, a weight between each two corners, and one above all; evenly thinned to `points`."""
    if not len(corners):
        return np.zeros(1)
    weights: Floats64 = np.r_[0.0, (corners[:-1] + corners[1:]) / 2, corners[-1] * 2]
    if len(weights) <= points:
        return weights
    places = np.unique(np.linspace(0, len(weights) - 1, max(2, points)).round().astype(int))
    thinned: Floats64 = weights[places]
    return thinned


def _undominated(tried: list[FrontPoint]) -> list[FrontPoint]:
    """Dearest and best first."""
    kept: list[FrontPoint] = []
    for point in sorted(tried, key=lambda point: (point.cost, point.loss, point.weight)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept[::-1]
