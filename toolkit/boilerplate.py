"""Boilerplate: wording that many rows of a pool share, such as a task's instruction.

Two rows are not alike for having the same instruction, and a pool row does not give a test item away by it. So five
words in a row that more than 20 rows contain (of all, or of a sample of 50,000 spread evenly) are boilerplate, and
the words in them say nothing about their row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xpert.words import HashedWords, Hashes, HashSet, grams, hash_words

__all__ = ["Boilerplate", "sample_step", "whole_texts"]

SIZE = 5
MOST_ROWS = 20
SAMPLE = 50_000


def whole_texts(batch: pa.RecordBatch) -> pa.Array:
    """Prompt and answer of each row as one text."""
    import pyarrow.compute as pc

    joint = pa.scalar("\n", pa.large_string())  # here, since pyarrow loads pandas for its first scalar
    return pc.binary_join_element_wise(batch.column("prompt"), batch.column("response"), joint)


def sample_step(rows: int) -> int:
    """Every how many rows one is sampled."""
    return max(1, -(-rows // SAMPLE))


class Boilerplate:
    """`HashSet` of the five-word runs that are boilerplate."""

    def __init__(self, runs: Hashes) -> None:
        self.runs = HashSet(runs)

    @classmethod
    def learn(cls, batches: Iterable[pa.RecordBatch], rows: int) -> Boilerplate:
        """From all batches of a pool of `rows` rows. Memory: 8 bytes for each word of the sample."""
        step = sample_step(rows)
        parts = []
        for texts in _sampled(batches, step):
            hashed = hash_words(texts)
            runs, at = grams(hashed, SIZE)
            parts.append(_once_a_row(runs, hashed.rows[at]))
        runs, counts = np.unique(np.concatenate(parts) if parts else np.empty(0, np.uint64), return_counts=True)
        return cls(runs[counts > MOST_ROWS])

    def covers(self, source: HashedWords) -> NDArray[np.bool_]:
        """[w] whether each word stands in a boilerplate run."""
        runs, at = grams(source, SIZE)
        starts = at[self.runs.contains(runs)]
        covered = np.zeros(len(source.hashes), dtype=bool)
        for step in range(SIZE):
            covered[starts + step] = True
        return covered


def _sampled(batches: Iterable[pa.RecordBatch], step: int) -> Iterator[pa.Array]:
    first = 0
    for batch in batches:
        chosen = np.arange(-first % step, batch.num_rows, step)
        first += batch.num_rows
        if len(chosen):
            yield whole_texts(batch.take(pa.array(chosen)) if step > 1 else batch)


def _once_a_row(runs: Hashes, rows: NDArray[np.int32]) -> Hashes:
    """Drops repetitions of a run inside one row."""
    order = np.argsort(runs, kind="stable")
    runs, rows = runs[order], rows[order]
    again = np.zeros(len(runs), dtype=bool)
    again[1:] = (runs[1:] == runs[:-1]) & (rows[1:] == rows[:-1])
    return runs[~again]
