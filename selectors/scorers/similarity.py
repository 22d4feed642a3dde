"""Likeness to the shots: the greatest cosine with any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors._anchors import describe_shot, needs_shots, similarities

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class SimilarityOptions(Config):
    reduce: str = option(
        "max", "over the shots: the nearest one (max), or the mean over all (mean)", choices=("max", "mean")
    )


class Similarity:
    """Cosine of a row's embedding with the shots': of the nearest shot, or the mean over all.

    embeddings [n, d], shots [K, d] -> score in -1..1. Unlike `kshot` it passes over no near-repeats.
    """

    Options: ClassVar[type[Config]] = SimilarityOptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "embeddings"})
    cost: ClassVar[str] = "embeddings, then time O(m K d) for m rows scored"
    source: ClassVar[str] = "the anchoring step of arXiv:2408.15915, Algorithm 2"

    def __init__(self, options: SimilarityOptions) -> None:
        self.options = options
        self._known: dict[int, tuple[int, float]] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._embeddings, self._anchors = features.embeddings(), features.shot_embeddings()
        self._describe = describe_shot(needs_shots("similarity", shots))

    def score(self, rows: NDArray[np.int64]) -> Floats:
        cosines = similarities(self._embeddings[rows], self._anchors)
        nearest = cosines.argmax(axis=1)
        best = cosines[np.arange(len(rows)), nearest]
        self._known.update(zip(rows.tolist(), zip(nearest.tolist(), best.tolist(), strict=True), strict=True))
        return np.asarray(best if self.options.reduce == "max" else cosines.mean(axis=1), np.float32)

    def explain(self, row: int) -> str:
        return self._describe(*self._known[row])


PLUGIN = Similarity
