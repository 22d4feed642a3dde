"""Which rows repeat an earlier one, by their embeddings."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["first_of_near"]

Bools = NDArray[np.bool_]

_BLOCK = 2048
_PLAIN_ROWS = 16_384
_DEVIATIONS = 6.0


def first_of_near(embeddings: Floats, threshold: float, *, exact: bool = False, seed: int = 0) -> Bools:
    """bool [n]: which rows stay when each row at `threshold` or more (cosine) to an earlier one that stays is dropped.

    embeddings [n, d], unit rows. Up to 16,384 rows every pair is looked at. Above, rows are compared with those of
    clusters near enough: rows x and y of nearest centroids c and c' have cos(x, c) - cos(x, c') <= |x - y| |c - c'|.
    With `exact` that bound is used as it is, which finds every pair and often saves little; without, six standard
    deviations of what x - y has along c - c' if it lies in no special direction of the d, which misses a pair now and
    then where d counts for less than it is (see benchmarks/results/near_rows.md). Memory O(n d + block k).
    Time: k-means into sqrt(n) clusters, then O(n p sqrt(n) d) for p clusters looked at per row.
    """
    if len(embeddings) <= _PLAIN_ROWS:
        return _walk(embeddings, threshold, _Everywhere(embeddings))
    slack = 1.0 if exact else min(1.0, _DEVIATIONS / math.sqrt(embeddings.shape[1]))
    return _walk(embeddings, threshold, _NearClusters(embeddings, threshold, slack, seed))


class _Everywhere:
    """The rows that stay so far, all in one matrix."""

    def __init__(self, embeddings: Floats) -> None:
        self.kept = _Growing(embeddings.shape[1])

    def repeats(self, block: Floats, threshold: float) -> Bools:
        near = np.zeros(len(block), dtype=bool)
        for start in range(0, len(self.kept.rows), 4 * _BLOCK):
            near |= _reaches(block, self.kept.rows[start : start + 4 * _BLOCK], threshold)
        return near

    def add(self, rows: Floats) -> None:
        self.kept.add(rows)


class _NearClusters:
    """The rows that stay so far, by their nearest centroid."""

    def __init__(self, embeddings: Floats, threshold: float, slack: float, seed: int) -> None:
        from xpert.clustering import cluster, different_rows

        count = different_rows(embeddings, round(math.sqrt(len(embeddings))))
        _, self.centroids = cluster(embeddings, count, seed=seed)
        squares = np.maximum(2 - 2 * self.centroids @ self.centroids.T, 0)
        self.gaps = slack * math.sqrt(max(0.0, 2 - 2 * threshold)) * np.sqrt(squares) + 1e-5
        self.kept = [_Growing(embeddings.shape[1]) for _ in range(count)]

    def repeats(self, block: Floats, threshold: float) -> Bools:
        cosines = block @ self.centroids.T
        nearest = cosines.argmax(axis=1)
        probes = cosines[np.arange(len(block)), nearest][:, None] - cosines <= self.gaps[nearest]
        near = np.zeros(len(block), dtype=bool)
        for number in np.flatnonzero(probes.any(axis=0)):
            kept = self.kept[number].rows
            if len(kept):
                rows = np.flatnonzero(probes[:, number] & ~near)
                near[rows] = _reaches(block[rows], kept, threshold)
        return near

    def add(self, rows: Floats) -> None:
        nearest = (rows @ self.centroids.T).argmax(axis=1)
        for number in np.unique(nearest):
            self.kept[number].add(rows[nearest == number])


class _Growing:
    """A matrix that rows are added to; its room doubles."""

    def __init__(self, width: int) -> None:
        self._room: Floats = np.empty((16, width), np.float32)
        self._count = 0

    @property
    def rows(self) -> Floats:
        return self._room[: self._count]

    def add(self, rows: Floats) -> None:
        wanted = self._count + len(rows)
        if wanted > len(self._room):
            room = np.empty((max(wanted, 2 * len(self._room)), self._room.shape[1]), np.float32)
            room[: self._count] = self.rows
            self._room = room
        self._room[self._count : wanted] = rows
        self._count = wanted


def _walk(embeddings: Floats, threshold: float, kept: _Everywhere | _NearClusters) -> Bools:
    keep = np.ones(len(embeddings), dtype=bool)
    for start in range(0, len(embeddings), _BLOCK):
        block = np.ascontiguousarray(embeddings[start : start + _BLOCK])
        near = kept.repeats(block, threshold)
        fresh = np.flatnonzero(~near)
        alike = np.triu(np.round(block[fresh] @ block[fresh].T, 6) >= threshold, 1)
        dropped = np.zeros(len(fresh), dtype=bool)
        for row in np.flatnonzero(alike.any(axis=1)):
            if not dropped[row]:
                dropped |= alike[row]
        near[fresh[dropped]] = True
        keep[start : start + len(block)] = ~near
        kept.add(block[~near])
    return keep


def _reaches(rows: Floats, others: Floats, threshold: float) -> Bools:
    return np.asarray(np.round((rows @ others.T).max(axis=1), 6) >= threshold)
