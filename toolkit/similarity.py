"""Cosine similarities in blocks, so that no n x n matrix is ever held. All rows are L2-normalised float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["max_similarity", "nearest", "similarity_blocks"]

_CELLS = 16_000_000
"""Similarities held at once: 64 MB."""


def similarity_blocks(left: Floats, right: Floats, *, cells: int = _CELLS) -> Iterator[tuple[int, Floats]]:
    """(first row, cosines [block, m]) for blocks of left's rows [n, d] against all of right's [m, d].

    Time O(n m d), memory O(cells + m).
    """
    rows = max(1, cells // max(1, len(right)))
    transposed = right.T
    for start in range(0, len(left), rows):
        yield start, left[start : start + rows] @ transposed


def max_similarity(rows: Floats, anchors: Floats, *, cells: int = _CELLS) -> tuple[Floats, NDArray[np.int64]]:
    """For each row [n, d] the cosine to its nearest anchor [K, d], and which anchor that is (ties: the first).

    Raises ValueError without anchors. Time O(n K d), memory O(n + cells).
    """
    if not len(anchors):
        raise ValueError("no anchors to compare with")
    best = np.empty(len(rows), np.float32)
    which = np.empty(len(rows), np.int64)
    for start, block in similarity_blocks(rows, anchors, cells=cells):
        end = start + len(block)
        which[start:end] = block.argmax(axis=1)
        best[start:end] = block[np.arange(len(block)), which[start:end]]
    return best, which


def nearest(
    queries: Floats, rows: Floats, k: int, *, skip_self: bool = False, cells: int = _CELLS
) -> tuple[Floats, NDArray[np.int64]]:
    """The exact k rows [m, d] most similar to each query [n, d]: cosines [n, k] descending, and indices [n, k].

    Ties go to the lowest index. `skip_self` leaves out row i for query i (queries and rows are the same matrix). k is
    lowered to the number of rows there are. Time O(n m (d + 1)), memory O(cells + n k).
    """
    k = max(0, min(k, len(rows) - (1 if skip_self else 0)))
    cosines = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    if k == 0:
        return cosines, indices
    for start, block in similarity_blocks(queries, rows, cells=cells):
        end = start + len(block)
        if skip_self:
            block[np.arange(len(block)), np.arange(start, end)] = -np.inf
        indices[start:end] = _top_columns(block, k)
        cosines[start:end] = np.take_along_axis(block, indices[start:end], axis=1)
    return cosines, indices


def _top_columns(block: Floats, k: int) -> NDArray[np.int64]:
    """The columns of the k largest values of each row, largest first, ties by the lowest column."""
    width = block.shape[1]
    if k >= width:
        return np.argsort(-block, axis=1, kind="stable")
    # Partitioning values and reading off where they stand is several times as fast as partitioning indices.
    threshold = np.partition(block, width - k, axis=1)[:, width - k, None]
    kept = block >= threshold
    # Where the k-th largest value stands more than once in a row, the last ones of them are too many.
    for row in np.flatnonzero(np.count_nonzero(kept, axis=1) > k):
        equal = np.flatnonzero(block[row] == threshold[row])
        kept[row, equal[k - np.count_nonzero(block[row] > threshold[row]) :]] = False
    columns = np.flatnonzero(kept).reshape(len(block), k) - width * np.arange(len(block))[:, None]
    values = np.take_along_axis(block, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
