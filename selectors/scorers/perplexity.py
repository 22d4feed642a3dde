"""How surprising a row's answer is to the base model: most surprising first, or within a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._answer_scores import NO_ROOM, AnswerValues

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class PerplexityOptions(Config):
    order: str = option("high", "which rows are best: the most surprising, or the least", choices=("high", "low"))
    low: float = option(0.0, "the window's lower end, a quantile of the pool's perplexities", minimum=0, maximum=1)
    high: float = option(1.0, "the window's upper end, a quantile of the pool's perplexities", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise BadInput(f"the window from low={self.low:g} to high={self.high:g} is empty")


class Perplexity:
    """exp of the mean negative log-likelihood of a row's answer, given its prompt, under the base model.

    Score: the perplexity's logarithm (order=high), or its negative (low). With a window (low, high: quantiles over
    the rows that can be scored, both ends within) the rows inside it come first, in that order, and then those outside,
    the nearest to the window first; a window reads the whole pool. Low and high ends of the scale hold broken rows and
    trivial ones. A row whose prompt leaves no room for its answer is not scored.
    """

    Options: ClassVar[type[Config]] = PerplexityOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "one forward pass of the base a row, kept"
    source: ClassVar[str] = "Marion et al. 2023, arXiv:2309.04564"

    def __init__(self, options: PerplexityOptions) -> None:
        self.options = options
        self._window: tuple[np.float32, np.float32] | None = None

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._values = AnswerValues(features, "nll")
        self._window = None
        if (self.options.low, self.options.high) != (0, 1):
            losses = self._values.read(np.arange(len(features.pool), dtype=np.int64))
            known = losses[np.isfinite(losses)]
            if len(known):
                low, high = np.quantile(known, [self.options.low, self.options.high])
                self._window = np.float32(low), np.float32(high)

    def score(self, rows: NDArray[np.int64]) -> Floats:
        losses = self._values.read(rows)
        sign = np.float32(1 if self.options.order == "high" else -1)
        if self._window is None:
            return sign * losses
        low, high = self._window
        worst = min(sign * low, sign * high)
        distance = np.maximum(low - losses, losses - high)
        # However near to the window a row is, one inside comes before it.
        outside = np.minimum(worst - distance, np.nextafter(worst, np.float32(-np.inf)))
        return np.where(distance > 0, outside, sign * losses)

    def explain(self, row: int) -> str:
        loss = self._values[row]
        if not np.isfinite(loss):
            return NO_ROOM
        text = f"perplexity {np.exp(loss):.4g}"
        if self._window is None or self._window[0] <= np.float32(loss) <= self._window[1]:
            return text
        return f"{text}, {'below' if loss < self._window[0] else 'above'} the window"

    def log(self) -> Sequence[Mapping[str, Any]]:
        if self._window is None:
            return self._values.log()
        low, high = (float(f"{np.exp(end):.4g}") for end in self._window)
        return [*self._values.log(), {"step": "window", "perplexity from": low, "to": high}]


PLUGIN = Perplexity
