"""Scores of any range brought to 0..1, so that they can be weighed against something else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["scaled"]


def scaled(scores: Floats) -> NDArray[np.float64]:
    """scores [n] -> 0 for the least to 1 for the greatest; rows without a score (NaN) get 0, and all do that tie."""
    known = np.isfinite(scores)
    if not known.any():
        return np.zeros(len(scores))
    least, most = float(scores[known].min()), float(scores[known].max())
    if least == most:
        return np.zeros(len(scores))
    return np.where(known, (np.where(known, scores, least) - least) / (most - least), 0.0)
