"""How much of a text consists of words that a corpus has."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from xpert.protocols import Floats

__all__ = ["Familiarity"]

_WORD = re.compile(r"\w+")


class Familiarity:
    """|known part| / |whole| of each text's TF-IDF vector over words: 1 where all words are known, 0 where none is.

    An embedder fitted on a small corpus drops unknown words before it normalises, so that a text which shares only a
    question mark with the corpus looks just like it. Times this ratio, its cosine is that of the whole text. A word of
    no row weighs the most: idf = log(1 + n) + 1. Cost: one pass over the words.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        rows_with = Counter(word for text in corpus for word in set(_words(text)))
        self._idf = {word: math.log((1 + len(corpus)) / (1 + rows)) + 1 for word, rows in rows_with.items()}
        self._unknown = math.log(1 + len(corpus)) + 1

    @classmethod
    def known(cls, idf: Mapping[str, float], *, unknown: float) -> Familiarity:
        """Of words whose weights are at hand; `unknown` is the weight of all others."""
        made = cls(())
        made._idf, made._unknown = dict(idf), unknown
        return made

    def of(self, texts: Sequence[str]) -> Floats:
        return np.array([self._one(text) for text in texts], dtype=np.float32)

    def _one(self, text: str) -> float:
        known = whole = 0.0
        for word, count in Counter(_words(text)).items():
            mass = ((1 + math.log(count)) * self._idf.get(word, self._unknown)) ** 2
            whole += mass
            known += mass if word in self._idf else 0.0
        return math.sqrt(known / whole) if whole else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
