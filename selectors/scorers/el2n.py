"""How far the base model is from a row's answer: the error of its predictions, token by token."""

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
class EL2NOptions(Config):
    order: str = option("high", "which rows are best: those the base errs most on, or least", choices=("high", "low"))


class EL2N:
    """|softmax(logits) - onehot|_2 of each answer token given all before it, averaged over the answer.

    0 where the base is certain and right, up to sqrt(2) where it is certain and wrong. Score: that mean (order=high),
    or its negative (low). A row whose prompt leaves no room for its answer is not scored.
    """

    Options: ClassVar[type[Config]] = EL2NOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "one forward pass of the base a row, kept and shared with perplexity, entropy and ifd"
    source: ClassVar[str] = "Paul et al. 2021, arXiv:2107.07075"

    def __init__(self, options: EL2NOptions) -> None:
        self.options = options

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._values = AnswerValues(features, "el2n")

    def score(self, rows: NDArray[np.int64]) -> Floats:
        values = self._values.read(rows)
        return values if self.options.order == "high" else -values

    def explain(self, row: int) -> str:
        return self._values.explain(row, "EL2N")

    def log(self) -> Sequence[Mapping[str, Any]]:
        return self._values.log()


PLUGIN = EL2N
