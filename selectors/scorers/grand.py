"""How strongly a row would move the base model: the length of its gradient (GraNd)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.gradients import GradientNorms, gradient_dtype
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._answer_scores import NO_ROOM

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class GrandOptions(Config):
    order: str = option(
        "high", "which rows are best: those of long gradients, or of short ones", choices=("high", "low")
    )
    layers: tuple[str, ...] = option(
        ("all",), "layers whose gradients count: attention, mlp, all (but the output head), or names such as q_proj"
    )
    dtype: str = option(
        "auto",
        "of the base; auto is bfloat16 where the device multiplies in it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )


class Grand:
    """Length of the gradient of a row's mean answer loss with respect to the base model's linear layers.

    Score: the length (order=high), or its negative (low). Exact, and no weight's gradient is formed where a row is
    short. Short answers have longer gradients, since their loss is a mean over fewer tokens. Not scored: rows whose
    prompt leaves no room for the answer.
    """

    Options: ClassVar[type[Config]] = GrandOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "one forward and one backward pass of the base a row, kept"
    source: ClassVar[str] = "Paul et al. 2021, arXiv:2107.07075; norms: Goodfellow 2015, arXiv:1510.01799"

    def __init__(self, options: GrandOptions) -> None:
        self.options = options
        self._norms: dict[int, float] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options = self.options
        self._features = features
        self._pass = GradientNorms(
            features.base(),
            options.layers,
            features.options.max_length,
            gradient_dtype(options.dtype, features.device),
        )

    def score(self, rows: NDArray[np.int64]) -> Floats:
        norms = self._features.compute(self._pass, rows)["norm"]
        self._norms.update(zip(rows.tolist(), norms.tolist(), strict=True))
        return np.asarray(norms if self.options.order == "high" else -norms, np.float32)

    def explain(self, row: int) -> str:
        norm = self._norms[row]
        return f"gradient norm {norm:.4g}" if np.isfinite(norm) else NO_ROOM


PLUGIN = Grand
