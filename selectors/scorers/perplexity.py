"""How surprising a row's answer is to the base model: most surprising first, or within a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.answer_losses import AnswerLosses
from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class PerplexityOptions(Config):
    order: str = option("high", "which rows are best: the most surprising, or the least", choices=("high", "low"))


class Perplexity:
    """exp of the mean negative log-likelihood of a row's answer, given its prompt, under the base model.

    Score: the perplexity's logarithm (order=high), or its negative (low).
    """

    Options: ClassVar[type[Config]] = PerplexityOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "one forward pass of the base a row, kept"
    source: ClassVar[str] = "Marion et al. 2023, arXiv:2309.04564"

    def __init__(self, options: PerplexityOptions) -> None:
        self.options = options
        self._losses: dict[int, float] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._features = features
        self._pass = AnswerLosses(features.base(), features.options.max_length)

    def score(self, rows: NDArray[np.int64]) -> Floats:
        nll = self._features.compute(self._pass, rows)["nll"]
        self._losses.update(zip(rows.tolist(), nll.tolist(), strict=True))
        return np.asarray(nll if self.options.order == "high" else -nll, np.float32)

    def explain(self, row: int) -> str:
        loss = self._losses[row]
        return f"perplexity {np.exp(loss):.4g}" if np.isfinite(loss) else "its prompt leaves no room for the answer"


PLUGIN = Perplexity
