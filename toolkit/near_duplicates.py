"""Near duplicates: rows that repeat an earlier one but for a few words.

MinHash signatures (rensa) of three-word runs, boilerplate left out, propose pairs; each pair is then checked on its
texts, and counts only if all of this holds, t being the threshold:

1. the three-word runs of prompt and answer together have a Jaccard similarity of at least t, and so have those of them
   that are not wholly boilerplate: a long common instruction makes no two rows alike;
2. the same numbers and the same signs of arithmetic stand in both, in the same order: `3 + 5` is not `3 + 6`;
3. the answers have the same words where one has fewer than ten, else their runs have a similarity of at least t.

A row is dropped when it is a near duplicate of an earlier row that is kept. It is compared with the first and the
latest four rows of each bucket it falls into, so the cost stays linear where thousands of rows are alike.
Source: Broder 1997, doi:10.1109/SEQUEN.1997.666900; rensa's R-MinHash, https://github.com/beowolx/rensa.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xpert.boilerplate import Boilerplate
from xpert.words import HashedWords, grams, hash_words, words

__all__ = ["NearDuplicates", "Pair", "Side", "bands_for", "near_duplicate", "sides"]

SIZE = 3
SHORT_ANSWER = 10
RECALL = 0.995  # of the pairs exactly at the threshold
MOST_HASHES = 64
LATEST = 4
FETCHED = 20_000  # pairs whose texts are held at a time
CHECKED = 2_000  # pairs whose runs are
_FIGURES = re.compile(r"\d+|[-+*/=<>%^×÷−≤≥≠]")


@dataclass(frozen=True, slots=True)
class Pair:
    """Row numbers: `later` repeats `earlier`."""

    later: int
    earlier: int


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, hashes a band): the widest bands that still propose RECALL of the pairs at the threshold."""
    for width in range(5, 0, -1):
        missed = 1 - threshold**width
        bands = 1 if missed <= 0 else math.ceil(math.log(1 - RECALL) / math.log(missed))
        if bands * width <= MOST_HASHES:
            return bands, width
    raise AssertionError("one hash a band always fits for thresholds of one half and more")


@dataclass(frozen=True, slots=True)
class Side:
    """What is compared of one row: its three-word runs, those of them that tell it from others, and its texts."""

    prompt: str
    response: str
    runs: frozenset[int]
    telling: frozenset[int]


def near_duplicate(one: Side, two: Side, threshold: float) -> bool:
    """The rule above."""
    return (
        _jaccard(one.telling, two.telling) >= threshold
        and _jaccard(one.runs, two.runs) >= threshold
        and _same_answer(words(one.response), words(two.response), threshold)
        and _figures(one) == _figures(two)
    )


def sides(rows: Sequence[tuple[str, str]], boilerplate: Boilerplate) -> list[Side]:
    """(prompt, answer) of rows -> their sides."""
    source = hash_words(pa.array([f"{prompt}\n{response}" for prompt, response in rows], pa.large_string()))
    runs, at = grams(source, SIZE)
    covered = boilerplate.covers(source)
    telling = ~(covered[at] & covered[at + 1] & covered[at + 2])
    ends = np.searchsorted(source.rows[at], np.arange(len(rows) + 1))
    found = []
    for number, (prompt, response) in enumerate(rows):
        part = slice(ends[number], ends[number + 1])
        whole = frozenset(runs[part].tolist())
        found.append(Side(prompt, response, whole, frozenset(runs[part][telling[part]].tolist())))
    return found


class NearDuplicates:
    """Collects signatures batch by batch (`add`), then finds the rows to drop (`find`).

    Memory: 8 bytes a band and row (48 bytes a row at the default threshold). Time: linear in words and in
    proposed pairs, of which there are at most five a band and row.
    """

    def __init__(self, threshold: float, boilerplate: Boilerplate) -> None:
        self.threshold, self.boilerplate = threshold, boilerplate
        self.bands, self.width = bands_for(threshold)
        self._keys: list[NDArray[np.uint64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._count = 0

    def add(self, source: HashedWords, covered: NDArray[np.bool_]) -> None:
        """The words of the next rows, and which of them are boilerplate."""
        from rensa import RMinHash

        runs, at = _telling(source, covered)
        counts = np.bincount(source.rows[at], minlength=len(source.offsets) - 1)
        signed = np.flatnonzero(counts)
        if len(signed):
            ends = np.concatenate(([0], np.cumsum(counts[signed]))).astype(np.uint64)
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(runs, ends, self.bands * self.width, 42)
            digests = np.array(matrix.to_rows(), dtype=np.uint64).reshape(-1, self.bands, self.width)
            keys = np.zeros(digests.shape[:2], dtype=np.uint64)
            for column in range(self.width):
                keys = (keys ^ digests[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(29)
            self._keys.append(keys)
            self._rows.append(signed + self._count)
        self._count += len(source.offsets) - 1

    def find(
        self, fetch: Callable[[NDArray[np.int64]], Sequence[tuple[str, str]]], *, skip: Iterable[int] = ()
    ) -> list[Pair]:
        """The pairs whose later row is to be dropped; `fetch` gives (prompt, answer) for sorted row numbers.

        Rows in `skip` are out already: nothing repeats them.
        """
        dropped = set(skip)
        found = []
        pairs = self._proposed()
        for start in range(0, len(pairs), FETCHED):
            chunk = pairs[start : start + FETCHED]
            numbers = np.unique(chunk)
            texts = dict(zip(numbers.tolist(), fetch(numbers), strict=True))
            for later, earlier in self._alike(chunk, texts, dropped):
                dropped.add(later)
                found.append(Pair(later, earlier))
        return found

    def _alike(
        self, pairs: NDArray[np.int64], texts: Mapping[int, tuple[str, str]], dropped: Set[int]
    ) -> Iterator[tuple[int, int]]:
        """The pairs that hold under the rule; `dropped` grows between them, and its rows are passed over."""
        for start in range(0, len(pairs), CHECKED):
            part = pairs[start : start + CHECKED]
            numbers = np.unique(part).tolist()
            known = dict(zip(numbers, sides([texts[n] for n in numbers], self.boilerplate), strict=True))
            for later, earlier in part.tolist():
                if later in dropped or earlier in dropped:
                    continue
                if near_duplicate(known[later], known[earlier], self.threshold):
                    yield later, earlier

    def _proposed(self) -> NDArray[np.int64]:
        """[p, 2] (later, earlier), sorted: rows that share a band with one they are compared with."""
        if not self._keys:
            return np.empty((0, 2), np.int64)
        rows = np.concatenate(self._rows)
        codes = np.empty(0, np.int64)
        for band in range(self.bands):
            keys = np.concatenate([part[:, band] for part in self._keys])
            later, earlier = _bucket_pairs(keys)
            codes = np.union1d(codes, rows[later] * self._count + rows[earlier])
        return np.stack(np.divmod(codes, self._count), axis=1)


def _telling(source: HashedWords, covered: NDArray[np.bool_]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The three-word runs with a word that is not boilerplate: hashes and positions."""
    runs, at = grams(source, SIZE)
    kept = ~(covered[at] & covered[at + 1] & covered[at + 2])
    return runs[kept], at[kept]


def _bucket_pairs(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (later, earlier) of positions with equal keys: each with the bucket's first and the LATEST before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
    place = np.arange(len(keys))
    later, earlier = [], []
    for back in range(1, LATEST + 1):
        members = np.flatnonzero(place - first >= back)
        later.append(order[members])
        earlier.append(order[members - back])
    far = np.flatnonzero(place - first > LATEST)
    later.append(order[far])
    earlier.append(order[first[far]])
    return np.concatenate(later), np.concatenate(earlier)


def _same_answer(one: list[str], two: list[str], threshold: float) -> bool:
    if min(len(one), len(two)) < SHORT_ANSWER:
        return one == two
    return _jaccard(_runs(one), _runs(two)) >= threshold


def _figures(side: Side) -> list[str]:
    return _FIGURES.findall(f"{side.prompt}\n{side.response}")


def _runs(spelt: list[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(spelt[at : at + SIZE]) for at in range(len(spelt) - SIZE + 1))


def _jaccard(one: frozenset[Any], two: frozenset[Any]) -> float:
    both = len(one & two)
    return both / (len(one) + len(two) - both) if one or two else 1.0
