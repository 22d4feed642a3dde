"""Which experts are kept under a total cost, so that every category is answered as well as can be: an integer program.

    maximise  sum over c of weight[c] * max over kept m of gain[c, m]   with   sum of the costs of those kept <= budget

It is the maximum coverage problem with weights (facility location with a knapsack), which is NP-hard; real ones, of
some hundred experts and some dozen categories, are solved exactly in well under a second. Source: the second stage of
Composition of Experts (https://arxiv.org/abs/2412.01868).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["kept_experts"]

_SCALE = 1e4
"""HiGHS stops at a gap of 1e-6 of the objective, whatever it is told; in ten thousandths of a score that is nothing."""


def kept_experts(
    gain: NDArray[np.float64], weight: NDArray[np.float64], costs: NDArray[np.int64], budget: int | None
) -> list[int]:
    """The places of the experts to keep, ascending; of equally good sets one that needs no expert in vain.

    gain [c, m]: what expert m gives to category c beyond the base, which is there in any case and costs nothing; where
    it is not above 0 the expert does not serve that category. weight [c] >= 0, costs [m] >= 0. None: no limit.
    """
    useful = np.flatnonzero(((gain > 0) & (weight[:, None] > 0)).any(axis=0))
    if budget is not None:
        useful = useful[costs[useful] <= budget]
        useful = _undominated(gain, costs, useful)
        if costs[useful].sum() > budget:
            useful = useful[_solve(gain[:, useful], weight, costs[useful], budget)]
    return _needed(gain[weight > 0], costs, useful)


def _needed(gain: NDArray[np.float64], costs: NDArray[np.int64], kept: NDArray[np.int64]) -> list[int]:
    """Without those, the dearest first, that no category misses: ones that another equals, or that nobody chooses."""
    left = sorted(kept.tolist(), key=lambda m: (costs[m], m))
    for place in reversed(left.copy()):
        others = [m for m in left if m != place]
        if (gain[:, others].max(axis=1, initial=0) >= gain[:, place]).all():
            left = others
    return sorted(left)


def _undominated(gain: NDArray[np.float64], costs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Without those that another, no dearer one matches or beats in every category: no best set needs them."""
    kept: list[int] = []
    served = np.maximum(gain, 0)
    for place in sorted(places.tolist(), key=lambda m: (costs[m], -served[:, m].sum(), m)):
        if not kept or not (served[:, kept] >= served[:, [place]]).all(axis=0).any():
            kept.append(place)
    return np.array(sorted(kept), dtype=np.int64)


def _solve(gain: NDArray[np.float64], weight: NDArray[np.float64], costs: NDArray[np.int64], budget: int) -> list[int]:
    """Variables: whether expert m is kept (x), and whether it answers category c (y, for every gain above 0)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    category, expert = np.nonzero((gain > 0) & (weight[:, None] > 0))
    m, pairs = gain.shape[1], len(category)
    unit = math.gcd(*costs.tolist())  # of experts of one rank, whose costs are alike, this leaves counts
    price, limit = costs // unit, budget // unit
    worth = weight[category] * gain[category, expert] * _SCALE
    ones, rows = np.ones(pairs), np.arange(pairs)
    one_each = csr_matrix((ones, (category, m + rows)), shape=(len(weight), m + pairs))
    if_kept = csr_matrix((np.r_[ones, -ones], (np.r_[rows, rows], np.r_[m + rows, expert])), shape=(pairs, m + pairs))
    scaled = csr_matrix((price / max(1, limit), (np.zeros(m, int), np.arange(m))), shape=(1, m + pairs))
    limits = [
        LinearConstraint(one_each, ub=1),
        LinearConstraint(if_kept, ub=0),
        LinearConstraint(scaled, ub=limit / max(1, limit)),
    ]
    while True:
        found = milp(
            np.r_[np.zeros(m), -worth],
            constraints=limits,
            integrality=np.r_[np.ones(m), np.zeros(pairs)],
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"the integer program was not solved: {found.message}")
        kept = np.flatnonzero(found.x[:m] > 0.5)
        if int(price[kept].sum()) <= limit:
            return [int(place) for place in kept]
        # Over the budget by less than the solver's tolerance: this set, and any that holds it, is ruled out.
        cover = csr_matrix((np.ones(len(kept)), (np.zeros(len(kept), int), kept)), shape=(1, m + pairs))
        limits.append(LinearConstraint(cover, ub=len(kept) - 1))
