"""The graph that facility location looks at: for each row those that are most like it, found cell by cell.

Rows are grouped by a few rounds of k-means, and a row is compared with those of its own cell and of the nearest ones.
How many cells are needed depends on the data, so it is measured: on rows drawn by seed, compared with the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CellGraph", "cell_graph", "k_means_cells"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

ROWS_PER_CELL = 400
SAMPLED = 128
KEPT = 0.96
"""Of the likeness between a row and the rows that could stand for it, so much must lie within the cells searched."""
SEARCHED = 20_000
"""Rows that a row is compared with at most: beyond, time would grow with the square of the pool."""
_CELLS = 4_000_000
_LONGEST = 4


@dataclass(frozen=True)
class CellGraph:
    """Lists one after another, one a target: `starts` [n + 1], `candidates` and their `cosines`; `limits` [n] are
    the cosines from which on a row stands in a list. Targets stand in no particular order."""

    starts: Ints
    candidates: NDArray[np.int32]
    cosines: Floats
    limits: Floats
    cells: int
    searched: int  # cells that a row is compared with
    kept: float  # the share, as in KEPT, within them


def k_means_cells(embeddings: Floats, seed: int, *, rough: bool = False) -> list[Ints]:
    """Rows, ascending, of each of about n / 400 clusters."""
    from xpert.clustering import cluster, cluster_count, different_rows

    # As many as `clusters` accepts: a pool of few different rows gets fewer.
    wanted = different_rows(embeddings, max(1, round(len(embeddings) / ROWS_PER_CELL)))
    labels, _ = cluster(embeddings, cluster_count(str(wanted), embeddings), seed=seed, rough=rough)
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [part.astype(np.int64) for part in parts]


def cell_graph(embeddings: Floats, share: int, width: int, rng: np.random.Generator) -> CellGraph:
    """About `width` most similar rows for each row of embeddings [n, d]; each taken row is to stand for `share` rows.

    Time O(n p d), p being the rows searched for one: 400 where the data have structure, and up to 20,000 where they
    have none. Memory O(n width).
    """
    cells = k_means_cells(embeddings, int(rng.integers(2**31)), rough=True)
    near = _nearest_cells(embeddings, cells)
    most = max(1, SEARCHED // ROWS_PER_CELL)
    searched, kept = _needed(embeddings, cells, near, min(share, width), most, rng)
    sizes, found, cosines, limits = [], [], [], []
    for cell, rows in enumerate(cells):
        others = np.sort(np.concatenate([cells[other] for other in near[cell, :searched]]))
        others = others[:: -(-len(others) // SEARCHED)]  # a cell of very many equal rows is not compared with itself
        vectors = embeddings[others].T
        for start in range(0, len(rows), max(1, _CELLS // len(others))):
            block = embeddings[rows[start : start + max(1, _CELLS // len(others))]] @ vectors
            at, length, limit = _most_similar(block, width)
            sizes.append(length)
            found.append(others[at % len(others)].astype(np.int32))
            cosines.append(block.ravel()[at])
            limits.append(limit)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return CellGraph(
        starts, np.concatenate(found), np.concatenate(cosines), np.concatenate(limits), len(cells), searched, kept
    )


def _nearest_cells(embeddings: Floats, cells: list[Ints]) -> Ints:
    """For each cell all of them [c, c], itself first, then by the cosine of their means."""
    means = np.stack([embeddings[rows].mean(axis=0) for rows in cells])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    cosines = means @ means.T
    np.fill_diagonal(cosines, np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")


def _needed(
    embeddings: Floats, cells: list[Ints], near: Ints, count: int, most: int, rng: np.random.Generator
) -> tuple[int, float]:
    """How many cells must be searched, and what they keep: of the summed cosines of sampled rows to the `count` rows
    most similar to them, the share that lies inside."""
    cell_of = np.empty(len(embeddings), dtype=np.int64)
    for cell, rows in enumerate(cells):
        cell_of[rows] = cell
    sample = np.sort(rng.permutation(len(embeddings))[:SAMPLED])
    cosines = embeddings[sample] @ embeddings.T
    cosines[np.arange(len(sample)), sample] = -1  # that a row is like itself tells nothing
    best = np.argpartition(cosines, len(embeddings) - count, axis=1)[:, len(embeddings) - count :]
    weights = np.maximum(np.take_along_axis(cosines, best, axis=1), 0)
    place = np.empty_like(near)
    np.put_along_axis(place, near, np.broadcast_to(np.arange(len(cells)), near.shape), axis=1)
    places = place[cell_of[sample][:, None], cell_of[best]]
    inside = np.bincount(places.ravel(), weights=weights.ravel(), minlength=len(cells)).cumsum()
    kept = inside / inside[-1] if inside[-1] > 0 else np.ones(len(cells))
    searched = min(int(np.searchsorted(kept, KEPT)) + 1, most, len(cells))
    return searched, float(kept[searched - 1])


def _most_similar(block: Floats, width: int) -> tuple[Ints, Ints, Floats]:
    """About `width` greatest values of each row: flat positions, how many in each row, and the least value taken.

    In a wide block the limit is estimated on every few columns; a list that comes out far too long, as where many
    rows are equal, is cut to `width`.
    """
    columns = block.shape[1]
    step = max(1, width // 8) if columns > 16 * width else 1
    part = block[:, ::step]
    rank = min(part.shape[1], max(1, width // step))
    limit = np.partition(part, part.shape[1] - rank, axis=1)[:, part.shape[1] - rank].copy()
    taken = block >= limit[:, None]
    sizes = np.count_nonzero(taken, axis=1)
    for row in np.flatnonzero(sizes > _LONGEST * width):
        taken[row] = False
        taken[row, np.argpartition(block[row], columns - width)[columns - width :]] = True
        limit[row] = block[row][taken[row]].min()
        sizes[row] = width
    return np.flatnonzero(taken), sizes, limit
