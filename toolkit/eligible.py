"""A pool's features without some of its rows, so that no selector can choose them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.array_cache import Arrays
from xpert.protocols import RowPass

if TYPE_CHECKING:
    from xpert.clustering import Clusters
    from xpert.features import Features

__all__ = ["EligibleFeatures"]


class EligibleFeatures:
    """Reads like the features of the pool without the rows `excluded`, and computes nothing anew.

    Rows keep their order and are numbered anew from 0; `keep` [m] int64 are their indices in the whole pool. The
    embeddings are copied: 4 m d bytes.
    """

    def __init__(self, features: Features, excluded: NDArray[np.int64]) -> None:
        self._features = features
        self.keep = np.setdiff1d(np.arange(len(features.pool), dtype=np.int64), excluded)
        self.pool = features.pool.without(excluded.tolist())

    @cached_property
    def _embeddings(self) -> NDArray[np.float32]:
        return np.asarray(self._features.embeddings()[self.keep], dtype=np.float32)

    def embeddings(self) -> NDArray[np.float32]:
        return self._embeddings

    def lengths(self) -> NDArray[np.int64]:
        return np.asarray(self._features.lengths()[self.keep], dtype=np.int64)

    def clusters(self) -> Clusters:
        """The whole pool's clusters with the labels of the rows that are left; a cluster may be empty."""
        whole = self._features.clusters()
        return dataclasses.replace(whole, labels=whole.labels[self.keep])

    def compute(self, row_pass: RowPass, rows: NDArray[np.int64]) -> Arrays:
        return self._features.compute(row_pass, self.keep[rows])

    def __getattr__(self, name: str) -> Any:
        """Everything that is not per row (shot embeddings, options, timings) is the whole pool's."""
        return getattr(self._features, name)
