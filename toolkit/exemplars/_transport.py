"""How far sets of exemplars lie from the queries: the exact optimal-transport distance of uniform weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["set_distances", "transport"]


def set_distances(exemplars: Floats, queries: Floats, sets: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The distance of each set of exemplars (rows of [K, d]) from the queries [m, d], unit rows: float64 [sets].

    The cost of a pair is 1 - cosine. The order within a set makes no difference, and equal sets are computed once.
    """
    costs = 1.0 - exemplars.astype(np.float64) @ queries.astype(np.float64).T
    known: dict[tuple[int, ...], float] = {}
    for rows in sets:
        key = tuple(sorted(rows))
        if key not in known:
            known[key] = transport(costs[list(key)])
    return np.array([known[tuple(sorted(rows))] for rows in sets])


def transport(costs: NDArray[np.float64]) -> float:
    """The least mean cost of moving k equal masses onto m equal masses, costs [k, m]; exact.

    Each side is repeated until both have the least common multiple L of k and m entries; then an optimal plan moves
    whole entries, which is an assignment. Time O(L^3) at worst: choose few queries, or as many as a multiple of k.
    """
    from scipy.optimize import linear_sum_assignment

    k, m = costs.shape
    least = math.lcm(k, m)
    repeated = np.repeat(np.repeat(costs, least // k, axis=0), least // m, axis=1)
    rows, columns = linear_sum_assignment(repeated)
    return float(repeated[rows, columns].mean())
