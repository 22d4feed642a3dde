"""What passes computed row by row, kept in shards as they are finished, so that a stopped pass goes on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.array_cache import Arrays, read_arrays, write_arrays
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.storage import draft_folder, hash_json

__all__ = ["RowStore"]

Ints = NDArray[np.int64]

_ROWS = "of-rows"
"""The array of each shard that says which rows the others are of."""


class RowStore:
    """The arrays of one pass over a pool of `rows` rows; row by row there or not.

    With a folder every shard is one folder in it, written whole and read memory-mapped; without, shards stay in
    memory. Several processes may add to one store: rows that two computed are read from either, the values being the
    same. A damaged shard is said to be so, removed, and its rows are missing again. Memory O(rows) besides the maps.
    """

    def __init__(self, folder: Path | None, rows: int, progress: Progress = SILENT) -> None:
        self.folder = folder
        self._shards: list[Arrays] = []
        self._shard_of = np.full(rows, -1, np.int32)
        self._place = np.zeros(rows, np.int32)
        for path in sorted(folder.glob("shard-*")) if folder else ():
            self._open(path, progress)

    def __len__(self) -> int:
        """How many rows are there."""
        return int((self._shard_of >= 0).sum())

    def missing(self, rows: Ints) -> Ints:
        """Which of these rows are not there, ascending, each once."""
        wanted = np.unique(rows)
        return wanted[self._shard_of[wanted] < 0]

    def add(self, rows: Ints, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keeps the arrays, whose first axis follows `rows` [m]."""
        wrong = [name for name, array in arrays.items() if len(array) != len(rows)]
        if wrong or not arrays:
            raise ValueError(f"a pass over {len(rows)} rows gave {wrong or 'nothing'} of another length")
        content: Arrays = {_ROWS: np.asarray(rows, np.int64), **arrays}
        if self.folder is None:
            self._know(content)
            return
        name = f"shard-{hash_json(content[_ROWS].tolist())[:24]}"
        target = self.folder / name
        try:
            with draft_folder(target) as draft:
                write_arrays(draft, {"rows": len(rows)}, content)
        except BadInput:
            if not target.is_dir():  # else another process has computed the same shard meanwhile
                raise
        self._know(read_arrays(target))

    def read(self, rows: Ints) -> Arrays:
        """The arrays of these rows [m], in their order; all must be there."""
        rows = np.asarray(rows, np.int64)
        shards = self._shard_of[rows]
        if not len(rows) or (shards < 0).any():
            raise ValueError("rows were asked for that no shard holds")
        found: Arrays = {}
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            for name, array in self._shards[shard].items():
                if name == _ROWS:
                    continue
                if name not in found:
                    found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                found[name][here] = array[self._place[rows[here]]]
        return found

    def drop(self) -> None:
        """Forgets all rows and removes what was stored."""
        self._shards.clear()
        self._shard_of[:] = -1
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _know(self, shard: Arrays) -> None:
        rows = np.asarray(shard[_ROWS])
        self._shard_of[rows] = len(self._shards)
        self._place[rows] = np.arange(len(rows))
        self._shards.append(shard)

    def _open(self, path: Path, progress: Progress) -> None:
        try:
            shard = read_arrays(path)
            rows = np.asarray(shard[_ROWS])
            if not len(rows) or rows.min() < 0 or rows.max() >= len(self._shard_of):
                raise ValueError("its rows are not of this pool")
        except (ValueError, EOFError, KeyError, TypeError, AttributeError, OSError, BadInput) as error:
            progress.say(f"stored {path.name} is damaged and is computed again ({path}: {error})")
            shutil.rmtree(path, ignore_errors=True)
            return
        self._know(shard)
