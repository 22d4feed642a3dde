"""Where to cut a row of observed values in two: by how many shall lie below, or by what is gained."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["cut_by_count", "cut_by_gain"]

Floats64 = NDArray[np.float64]


def cut_by_count(values: Floats64, count: float) -> float:
    """The threshold that as nearly as can be `count` of the values [n] lie under, of two the lower.

    Equal values stay together. With 0 nothing lies under it, with n everything. Time O(n log n).
    """
    thresholds, under = _cuts(values)
    return float(thresholds[int(np.argmin(np.round(np.abs(under - count), 9)))])


def cut_by_gain(values: Floats64, gains: Floats64) -> float:
    """The threshold that maximises the sum of the gains [n] of the values [n] under it; of several, the lowest."""
    thresholds, under = _cuts(values)
    order = np.argsort(values, kind="stable")
    summed = np.r_[0.0, np.cumsum(gains[order])][under]
    return float(thresholds[int(np.argmax(np.round(summed, 9)))])


def _cuts(values: Floats64) -> tuple[Floats64, NDArray[np.int64]]:
    """Every threshold that matters, ascending, and how many values lie under each: the lowest value itself, the middle
    between each two neighbours, and the next number above the highest."""
    distinct, counts = np.unique(values, return_counts=True)
    above = math.nextafter(float(distinct[-1]), math.inf)
    middles = (distinct[:-1] + distinct[1:]) / 2
    # Between two numbers that are neighbours there is none: the upper one, which is not under itself, does as well.
    middles = np.maximum(middles, np.nextafter(distinct[:-1], np.inf))
    return np.r_[distinct[0], middles, above], np.r_[0, np.cumsum(counts)]
