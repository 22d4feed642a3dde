"""Which rows repeat an earlier one, by their embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["first_of_near"]

_BLOCK = 2048


def first_of_near(embeddings: Floats, threshold: float) -> NDArray[np.bool_]:
    """bool [n]: which rows stay when each row at `threshold` or more (cosine) to an earlier one that stays is dropped.

    embeddings [n, d], unit rows. Exact. Time O(n k d) for k rows that stay, memory O(k d + block k).
    """
    keep = np.ones(len(embeddings), dtype=bool)
    kept = np.empty_like(embeddings)
    count = 0
    for start in range(0, len(embeddings), _BLOCK):
        block = embeddings[start : start + _BLOCK]
        near = np.zeros(len(block), dtype=bool)
        for first in range(0, count, 4 * _BLOCK):
            near |= np.round((block @ kept[first : min(first + 4 * _BLOCK, count)].T).max(axis=1), 6) >= threshold
        inside = np.round(block @ block.T, 6) >= threshold
        for row in np.flatnonzero(~near):
            if near[row]:
                continue
            near |= inside[row] & (np.arange(len(block)) > row)
        keep[start : start + len(block)] = ~near
        staying = block[~near]
        kept[count : count + len(staying)] = staying
        count += len(staying)
    return keep
