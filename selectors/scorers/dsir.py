"""DSIR: how much likelier a row's words are under the shots than under the pool."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors._anchors import needs_shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "NgramBuckets"]

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]

_WORD = re.compile(r"\w+|[^\w\s]+")
_TEXTS = 4096
_MOST_KEPT = 2_000_000


@dataclass(frozen=True)
class DSIROptions(Config):
    gumbel: bool = option(True, "add Gumbel noise: the best are then a sample by importance without replacement")
    pseudo_count: float = option(
        0.1,
        "added to each bucket's count in the shots (0: as published, for targets of many thousand texts)",
        minimum=0,
    )
    buckets: int = option(10_000, "how many buckets the n-grams are hashed to", minimum=2)
    text: str = option(
        "both", "what of a row is read: its prompt, its answer, or both", choices=("both", "prompt", "response")
    )
    min_words: int = option(0, "rows of fewer words are not scored (the released code: 100, for web pages)", minimum=0)


class DSIR:
    """Log importance weight of a row's hashed uni- and bigrams, the shots being the target.

    Words are runs of letters and digits or of other signs, in lower case; each word and pair of neighbours counts in
    bucket sha256 mod `buckets`. log w = sum over b of count_b * (log(p_b + 1e-8) - log(q_b + 1e-8)), p from the shots,
    q from the whole pool. Score: log w, plus a draw from Gumbel(0, 1) with `gumbel`; draws follow the seed and the
    row's place. Weights grow with length: they say how likely a whole row is, not one of its words.

    A handful of shots leaves most buckets empty, and without a pseudo-count each word that they do not hold costs a
    row some ten units. On a mixed pool and up to eight shots of a skill (five skills), 42 % of the 200 best rows were
    of that skill with 0, 89 % with 0.1, 92 % with 0.3 and 33 % with 1.
    """

    Options: ClassVar[type[Config]] = DSIROptions
    needs: frozenset[str] = frozenset({"shots", "answers"})
    cost: ClassVar[str] = "one pass over the pool's words (a million in some seconds), memory 4 bytes an n-gram"
    source: ClassVar[str] = "Data Selection for Language Models via Importance Resampling, arXiv:2302.03169"

    def __init__(self, options: DSIROptions) -> None:
        self.options = options
        if options.text == "prompt":
            self.needs = self.needs - {"answers"}
        self._weights: Doubles = np.empty(0)

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        buckets = NgramBuckets(self.options.buckets)
        target = np.zeros(self.options.buckets) + self.options.pseudo_count
        given = needs_shots("dsir", shots, answers="answers" in self.needs)
        for part, _ in buckets.read(self._text(row.prompt, row.response) for row in given):
            target += np.bincount(part, minlength=self.options.buckets)
        texts = map(self._text, features.pool.prompts(), features.pool.responses())
        read = [(part.astype(np.uint32), sizes) for part, sizes in buckets.read(texts)]
        pool = np.zeros(self.options.buckets)
        for kept, _ in read:
            pool += np.bincount(kept, minlength=self.options.buckets)
        gain = _log_shares(target) - _log_shares(pool)
        self._weights = np.concatenate([_sums(gain[kept], sizes) for kept, sizes in read])
        self._words = np.concatenate([(sizes + 1) // 2 for _, sizes in read])
        self._noise = rng.gumbel(size=len(self._weights)) if self.options.gumbel else np.zeros(len(self._weights))

    def _text(self, prompt: str, response: str) -> str:
        return {"prompt": prompt, "response": response, "both": f"{prompt}\n{response}"}[self.options.text]

    def score(self, rows: Ints) -> Floats:
        scores = self._weights[rows] + self._noise[rows]
        return np.where(self._words[rows] < self.options.min_words, np.nan, scores).astype(np.float32)

    def explain(self, row: int) -> str:
        words = int(self._words[row])
        if words < self.options.min_words:
            return f"{words} words are fewer than {self.options.min_words}"
        drawn = f", draw {self._noise[row]:+.3g}" if self.options.gumbel else ""
        return f"log importance {self._weights[row]:.4g} of {words} words{drawn}"


class NgramBuckets:
    """Texts to the buckets of their words and pairs of words: sha256 runs once for each that is different.

    Words are numbered, a pair is one number made of two, and numpy finds the different ones of some thousand texts; up
    to two million of them are remembered between those.
    """

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self._number: dict[str, int] = {}
        self._spelt: list[str] = []
        self._known: dict[int, int] = {}

    def read(self, texts: Iterable[str]) -> Iterator[tuple[Ints, Ints]]:
        """(buckets of all n-grams, text after text; how many each text has), for some thousand texts at a time."""
        texts = iter(texts)
        while chunk := list(islice(texts, _TEXTS)):
            yield self._read(chunk)

    def _read(self, texts: list[str]) -> tuple[Ints, Ints]:
        number = self._number
        numbers: list[int] = []
        sizes = np.empty(len(texts), dtype=np.int64)
        for place, text in enumerate(texts):
            words = _WORD.findall(text.lower())
            for word in words:
                if word not in number:
                    number[word] = len(self._spelt)
                    self._spelt.append(word)
            numbers.extend([number[word] for word in words])
            sizes[place] = len(words)
        flat = np.array(numbers, dtype=np.int64)
        text_of = np.repeat(np.arange(len(texts)), sizes)
        inside = text_of[1:] == text_of[:-1]
        pairs = ((flat[:-1] + 1) << 32 | flat[1:])[inside]
        codes = np.concatenate([flat, pairs])
        order = np.argsort(np.concatenate([text_of, text_of[1:][inside]]), kind="stable")
        different, which = np.unique(codes, return_inverse=True)
        found = np.array([self._bucket(code) for code in different.tolist()], dtype=np.int64)
        return found[which][order], np.maximum(2 * sizes - 1, 0)

    def _bucket(self, code: int) -> int:
        known = self._known.get(code)
        if known is None:
            first, last = code >> 32, code & 0xFFFFFFFF
            gram = f"{self._spelt[first - 1]} {self._spelt[last]}" if first else self._spelt[last]
            known = int.from_bytes(sha256(gram.encode("utf-8", "surrogatepass")).digest(), "big") % self.buckets
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[code] = known
        return known


def _log_shares(counts: Doubles) -> Doubles:
    return np.asarray(np.log(counts / max(counts.sum(), 1e-300) + 1e-8))


def _sums(values: Doubles, sizes: Ints) -> Doubles:
    """The sum of each run of values; 0 for an empty one."""
    return np.bincount(np.repeat(np.arange(len(sizes)), sizes), weights=values, minlength=len(sizes)).astype(np.float64)


PLUGIN = DSIR
