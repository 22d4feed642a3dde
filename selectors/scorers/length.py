"""The number of supervised tokens: long answers first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config
from xpert.protocols import Floats
from xpert.records import Shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


class Length:
    """How many tokens of a row training learns from, in the features' unit.

    A plain control: on instruction data the longest answers alone are a strong baseline.
    """

    Options: ClassVar[type[Config]] = Config
    needs: ClassVar[frozenset[str]] = frozenset({"lengths"})
    cost: ClassVar[str] = "one pass over the answers"
    source: ClassVar[str] = "Zhao et al. 2024, arXiv:2402.04833"

    def __init__(self, options: Config) -> None:
        self._lengths: NDArray[np.int64] = np.empty(0, np.int64)

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._lengths = features.lengths()
        self._unit = features.lengths_unit

    def score(self, rows: NDArray[np.int64]) -> Floats:
        return self._lengths[rows].astype(np.float32)

    def explain(self, row: int) -> str:
        return f"{int(self._lengths[row]):,} {self._unit}"


PLUGIN = Length
