"""Decontamination: pool rows that overlap the shots, or the test items of an `--avoid` file.

A pool row overlaps an avoided row if

1. their prompts are the same text, but for letter case, spaces and punctuation at the ends; or
2. they share eight words in a row, none of whose five-word runs is boilerplate of the pool (`xpert.boilerplate`): an
   instruction that many rows share says nothing about a test item. Prompts and answers of pool rows are searched for
   what stands in an avoided prompt, or in an avoided answer of 16 words or more: shorter ones are often labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xpert.boilerplate import SIZE as RUN
from xpert.boilerplate import Boilerplate, whole_texts
from xpert.pool import Pool
from xpert.records import Row
from xpert.words import HashedWords, HashSet, grams, hash_words, words

__all__ = ["WORDS", "Avoided", "Overlap", "overlapping_rows", "same_text_key"]

WORDS = 8
LABEL_WORDS = 16
_EDGES = " .,;:!?…\"'`"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Pool row `row` (a number within its batch) overlaps the avoided row named `of`."""

    row: int
    of: str
    reason: str


def same_text_key(text: str) -> str:
    """The form in which two prompts are compared as a whole."""
    return " ".join(text.casefold().split()).strip(_EDGES)


class Avoided:
    """The rows to stay clear of, ready to be looked up. `label` tells what they are: "the shots", a file's name."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[str, str]] = {}
        self._owners: dict[int, tuple[str, str]] = {}
        self._hashes = HashSet(np.empty(0, np.uint64))

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def add(self, rows: Iterable[Row], label: str) -> None:
        rows = list(rows)
        texts: list[str] = []
        owners: list[tuple[str, str]] = []
        for row in rows:
            self._prompts.setdefault(same_text_key(row.prompt), (row.id, label))
            texts.append(row.prompt)
            if len(words(row.response)) >= LABEL_WORDS:
                texts.append(row.response)
            owners += [(row.id, label)] * (len(texts) - len(owners))
        source = hash_words(pa.array(texts, pa.large_string()))
        runs, at = grams(source, WORDS)
        for run, text in zip(runs.tolist(), source.rows[at].tolist(), strict=True):
            self._owners.setdefault(run, owners[text])
        self._hashes = HashSet(np.fromiter(self._owners, dtype=np.uint64, count=len(self._owners)))

    def find(
        self, texts: Sequence[str], prompts: Sequence[str], source: HashedWords, boilerplate: Boilerplate
    ) -> list[Overlap]:
        """The rows of a batch that overlap, in order. `source` are the words of `texts` (prompt and answer)."""
        found: dict[int, Overlap] = {}
        for row, prompt in enumerate(prompts):
            owner = self._prompts.get(same_text_key(prompt))
            if owner:
                found[row] = Overlap(row, owner[0], f"same prompt as a row of {owner[1]}")
        runs, at = grams(source, WORDS)
        hits = np.flatnonzero(self._hashes.contains(runs))
        if len(hits):
            telling = ~_holds_boilerplate(source, boilerplate)[at[hits]]
            for hit in hits[telling].tolist():
                row = int(source.rows[at[hit]])
                if row not in found:
                    start = int(at[hit] - source.offsets[row])
                    shared = " ".join(words(texts[row])[start : start + WORDS])
                    name, label = self._owners[int(runs[hit])]
                    found[row] = Overlap(row, name, f"shares eight words with a row of {label}: {shared}")
        return [found[row] for row in sorted(found)]


def _holds_boilerplate(source: HashedWords, boilerplate: Boilerplate) -> NDArray[np.bool_]:
    """[w] whether one of the five-word runs inside the WORDS words from here on is boilerplate."""
    runs, at = grams(source, RUN)
    starts = np.zeros(len(source.hashes) + WORDS, dtype=bool)
    starts[at[boilerplate.runs.contains(runs)]] = True
    inside = np.zeros(len(source.hashes), dtype=bool)
    for step in range(WORDS - RUN + 1):
        inside |= starts[step : step + len(source.hashes)]
    return inside


def overlapping_rows(
    pool: Pool, rows: Iterable[Row], *, label: str = "the shots"
) -> tuple[NDArray[np.int64], list[str]]:
    """Pool rows that overlap `rows` by the rule above: their numbers in order, and a reason for each.

    A selector leaves these out so that no shot, and no near copy of one, is chosen. Time: about 10 microseconds a row.
    """
    avoided = Avoided()
    avoided.add(rows, label)
    numbers, reasons, first = [], [], 0
    for batch in pool.table.to_batches(max_chunksize=8192):
        texts = whole_texts(batch)
        prompts = batch.column("prompt").to_pylist()
        for overlap in avoided.find(texts.to_pylist(), prompts, hash_words(texts), pool.boilerplate):
            numbers.append(first + overlap.row)
            reasons.append(overlap.reason)
        first += batch.num_rows
    return np.array(numbers, dtype=np.int64), reasons
