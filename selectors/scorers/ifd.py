"""Instruction-following difficulty: how much of an answer's difficulty its prompt does not take away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.answer_losses import UNPROMPTED, AnswerLosses, UnpromptedLosses
from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._answer_scores import NO_ROOM

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class IFDOptions(Config):
    mode: str = option(
        "loss",
        "the ratio of the two mean losses (loss: Cherry LLM's code), or of the two perplexities (ppl: Superfiltering)",
        choices=("loss", "ppl"),
    )
    prefix: str = option(UNPROMPTED, "what stands before the answer where it is read without its prompt")


class IFD:
    """Loss of the answer given its prompt over its loss alone, under the base: near 1 the prompt hardly helps.

    mode=loss: IFD = nll(answer | prompt) / nll(answer); mode=ppl: exp(nll(answer | prompt) - nll(answer)); means over
    the same answer tokens. Score: IFD where it is at most 1, greatest first. Above 1 the prompt misleads, which marks
    pairs that do not fit: those rows come after all others, the least above 1 first, their score being -log(IFD).
    Rows whose prompt leaves no room for the answer are not scored, nor are those whose answer is certain without a
    prompt (the ratio has no value); the log counts both, rows above 1 and rows cut to the context.
    """

    Options: ClassVar[type[Config]] = IFDOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = "two forward passes of the base a row, kept; the first is shared with perplexity and el2n"
    source: ClassVar[str] = "Li et al. 2024, arXiv:2308.12032 (Cherry LLM) and arXiv:2402.00530 (Superfiltering)"

    def __init__(self, options: IFDOptions) -> None:
        self.options = options

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._features = features
        limit = features.options.max_length
        self._prompted = AnswerLosses(features.base(), limit)
        self._alone = UnpromptedLosses(features.base(), limit, self.options.prefix)
        self._known: dict[int, float] = {}
        self._certain: set[int] = set()
        self._cut: set[int] = set()

    def score(self, rows: NDArray[np.int64]) -> Floats:
        if not len(rows):
            return np.empty(0, np.float32)
        prompted = self._features.compute(self._prompted, rows)
        given = np.asarray(prompted["nll"], np.float64)
        alone = np.asarray(self._features.compute(self._alone, rows)["nll"], np.float64)
        logs = _log_ratio(given, alone, self.options.mode)
        self._known.update(zip(rows.tolist(), logs.tolist(), strict=True))
        self._certain.update(rows[alone == 0].tolist())
        self._cut.update(rows[np.asarray(prompted["cut"], bool)].tolist())
        # exp only where it cannot overflow; -log(IFD) is below 0, and IFD up to 1 is not.
        return np.where(logs > 0, -logs, np.exp(np.minimum(logs, 0))).astype(np.float32)

    def explain(self, row: int) -> str:
        known = self._known[row]
        if not np.isnan(known):
            return f"IFD {np.exp(min(known, 700.0)):.4g}{'' if known <= 0 else ', above 1'}"
        return "its answer is certain without a prompt" if row in self._certain else NO_ROOM

    def log(self) -> Sequence[Mapping[str, Any]]:
        logs = np.array(list(self._known.values()))
        counts = {"rows": len(logs), "above 1": int((logs > 0).sum())}
        lacking = {"certain without a prompt": len(self._certain), "no room": int(np.isnan(logs).sum())}
        lacking["no room"] -= len(self._certain)
        return [{"step": "IFD", **counts, **lacking, "longer than the context": len(self._cut)}]


def _log_ratio(given: NDArray[np.float64], alone: NDArray[np.float64], mode: str) -> NDArray[np.float64]:
    """log IFD [m]: NaN where a loss is missing or the answer alone costs nothing; -inf where IFD is 0."""
    if mode == "ppl":
        ratio = given - alone
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(given) - np.log(alone)
    return np.where(alone == 0, np.nan, ratio)


PLUGIN = IFD
