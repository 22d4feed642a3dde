"""Scores of any range brought to one scale, so that they can be weighed against something else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["scaled", "standardised"]


def standardised(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """(score - mean) / standard deviation, float64 [n]; zeros where all are alike, NaN where there is no score."""
    values = np.asarray(scores, np.float64)
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(values), np.nan)
    spread = values[known].std()
    centred = np.where(known, values - values[known].mean(), np.nan)
    return centred / spread if spread > 1e-12 * max(1.0, float(np.abs(values[known]).max())) else centred * 0.0


def scaled(scores: Floats) -> NDArray[np.float64]:
    """scores [n] -> 0 for the least to 1 for the greatest; rows without a score (NaN) get 0, and all do that tie."""
    known = np.isfinite(scores)
    if not known.any():
        return np.zeros(len(scores))
    least, most = float(scores[known].min()), float(scores[known].max())
    if least == most:
        return np.zeros(len(scores))
    return np.where(known, (np.where(known, scores, least) - least) / (most - least), 0.0)
