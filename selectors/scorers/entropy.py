"""How undecided the base model is along a row's answer: the entropy of its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._answer_scores import AnswerValues

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class EntropyOptions(Config):
    order: str = option(
        "high", "which rows are best: those the base is least decided on, or most", choices=("high", "low")
    )


class Entropy:
    """The entropy of the base's distribution over the next token, averaged over the positions of the answer, in nats.

    It does not look at which token the answer has there. Score: that mean (order=high), or its negative (low). A row
    whose prompt leaves no room for its answer is not scored.
    """

    Options: ClassVar[type[Config]] = EntropyOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "one forward pass of the base a row, kept and shared with perplexity, el2n and ifd"
    source: ClassVar[str] = "uncertainty sampling, Lewis and Gale 1994, doi:10.1007/978-1-4471-2099-5_1"

    def __init__(self, options: EntropyOptions) -> None:
        self.options = options

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._values = AnswerValues(features, "entropy")

    def score(self, rows: NDArray[np.int64]) -> Floats:
        values = self._values.read(rows)
        return values if self.options.order == "high" else -values

    def explain(self, row: int) -> str:
        return self._values.explain(row, "entropy")

    def log(self) -> Sequence[Mapping[str, Any]]:
        return self._values.log()


PLUGIN = Entropy
