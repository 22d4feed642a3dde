"""Pass 2 of building a pool: near duplicates, and overlap with rows to avoid, found in the rows of pass 1 on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xpert.boilerplate import Boilerplate, whole_texts
from xpert.near_duplicates import NearDuplicates
from xpert.overlap import Avoided
from xpert.pool import ROWS_FILE, RowsWriter
from xpert.progress import Progress
from xpert.words import hash_words

__all__ = ["Dropped", "clean"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Row `row` of pass 1 is dropped: it repeats or overlaps the row with the id `of`."""

    row: int
    of: str
    reason: str
    kind: str


Reject = Callable[[pa.RecordBatch, int, Sequence[Dropped]], None]


def clean(
    written: RowsWriter, avoided: Avoided, threshold: float | None, reject: Reject, progress: Progress
) -> RowsWriter:
    """Drops rows from a finished `rows/` folder; `reject` is told of each batch's. Gives the writer of what is left."""
    if (threshold is None and not avoided) or not written.rows:
        return written
    boilerplate = Boilerplate.learn(_batches(written.folder), written.rows)
    near = NearDuplicates(threshold, boilerplate) if threshold is not None else None
    dropped: dict[int, Dropped] = {}
    with progress.task("comparing rows", written.rows) as task:
        first = 0
        for batch in _batches(written.folder):
            texts = whole_texts(batch)
            source = hash_words(texts)
            if avoided:
                prompts = batch.column("prompt").to_pylist()
                for overlap in avoided.find(texts.to_pylist(), prompts, source, boilerplate):
                    row = first + overlap.row
                    dropped[row] = Dropped(row, overlap.of, overlap.reason, "overlap")
            if near is not None:
                near.add(source, boilerplate.covers(source))
            first += batch.num_rows
            task.advance(batch.num_rows)
    if near is not None:
        dropped |= _near(near, written.folder, dropped)
    return _rewritten(written, dropped, reject) if dropped else written


def _near(near: NearDuplicates, folder: Path, dropped: dict[int, Dropped]) -> dict[int, Dropped]:
    """Rows that are near duplicates of one that is kept and not dropped already."""

    def fetch(numbers: NDArray[np.int64]) -> list[tuple[str, str]]:
        part = _picked(folder, numbers, ["prompt", "response"])
        return list(zip(part["prompt"].to_pylist(), part["response"].to_pylist(), strict=True))

    pairs = near.find(fetch, skip=dropped.keys())
    if not pairs:
        return {}
    earlier = np.array([pair.earlier for pair in pairs])
    numbers, places = np.unique(earlier, return_inverse=True)
    names = _picked(folder, numbers, ["id"])["id"].take(places).to_pylist()
    return {
        pair.later: Dropped(pair.later, name, "near duplicate", "near duplicate")
        for pair, name in zip(pairs, names, strict=True)
    }


def _rewritten(written: RowsWriter, dropped: dict[int, Dropped], reject: Reject) -> RowsWriter:
    folder = written.folder
    before = folder.rename(folder.with_name("rows-before"))
    writer = RowsWriter(folder)
    numbers = np.array(sorted(dropped), dtype=np.int64)
    first = 0
    for batch in _batches(before):
        here = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + batch.num_rows)]
        if len(here):
            reject(batch, first, [dropped[row] for row in here.tolist()])
            keep = np.ones(batch.num_rows, dtype=bool)
            keep[here - first] = False
            writer.write(batch.filter(pa.array(keep)))
        else:
            writer.write(batch)
        first += batch.num_rows
    writer.close()
    shutil.rmtree(before)
    return writer


def _picked(folder: Path, numbers: NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Rows by their sorted numbers. The file is read through: mapping it would hold all of it in memory."""
    parts, first = [], 0
    for batch in _batches(folder):
        here = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + batch.num_rows)]
        if len(here):
            parts.append(batch.select(columns).take(pa.array(here - first)))
        first += batch.num_rows
    return pa.Table.from_batches(parts)


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows as they were written, read (not mapped) one batch at a time."""
    with pa.OSFile(str(folder / ROWS_FILE), "rb") as file, pa.ipc.open_stream(file) as stream:
        yield from stream
