"""How many steps an answer takes: the most complex ones first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.)])\s+", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=[\"')\]]*\s)|[。！？]+|\n+")
_WORD = re.compile(r"\w")


def _lines(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.strip())


def _sentences(text: str) -> int:
    return sum(1 for part in _SENTENCE_END.split(_LIST_MARK.sub("", text)) if _WORD.search(part))


def _steps(text: str) -> int:
    lines = _lines(text)
    return lines if lines > 1 else _sentences(text)


_MEASURES: dict[str, Callable[[str], int]] = {
    "steps": _steps,
    "lines": _lines,
    "sentences": _sentences,
    "length": lambda text: len(text.split()),
}
_UNITS = {"length": "words"}


@dataclass(frozen=True)
class ComplexityOptions(Config):
    measure: str = option(
        "steps",
        "what is counted: steps (lines, or the sentences of a text of one line), lines, sentences, or length in words",
        choices=tuple(_MEASURES),
    )
    of: str = option("response", "which text is read", choices=("response", "prompt"))


class Complexity:
    """The number of reasoning steps of a row's answer, as its layout shows them.

    Exemplars with more steps were found to make better demonstrations. Lines without content do not count, nor do the
    numbers of a list as sentences. Score: the count; many rows tie, and the lowest index goes first.
    """

    Options: ClassVar[type[Config]] = ComplexityOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    cost: ClassVar[str] = "one pass over the texts"
    source: ClassVar[str] = "Fu et al. 2023, arXiv:2210.00720 (complexity-based prompting)"

    def __init__(self, options: ComplexityOptions) -> None:
        self.options = options
        self._known: dict[int, int] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._pool = features.pool

    def score(self, rows: NDArray[np.int64]) -> Floats:
        measure = _MEASURES[self.options.measure]
        counts = [measure(text) for text in self._pool.take(rows)[self.options.of].to_pylist()]
        self._known.update(zip(rows.tolist(), counts, strict=True))
        return np.array(counts, np.float32)

    def explain(self, row: int) -> str:
        return f"{self._known[row]:,} {_UNITS.get(self.options.measure, self.options.measure)}"


PLUGIN = Complexity
