"""Arrays cached by content: one folder per entry, memory-mapped `.npy` files in it, there whole or not at all.

Two processes may make the same entry at once: both compute, the first to finish wins, both read a whole entry.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.storage import draft_folder, hash_json, read_json, write_json

__all__ = ["ArrayCache", "Arrays", "read_arrays", "write_arrays"]

Arrays = dict[str, NDArray[Any]]

_INDEX = "entry.json"


class ArrayCache:
    """Entries under `folder`; with None nothing is kept and every entry is made anew."""

    def __init__(self, folder: Path | None, progress: Progress = SILENT) -> None:
        self.folder = folder
        self.progress = progress

    def get_or_make(self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """The arrays of an entry: read where they are stored whole, else made and stored.

        `key` is plain JSON that determines the arrays. A damaged entry is said to be so and made again.
        """
        found = self.find(kind, key)
        if found is not None:
            return found
        made = dict(make())
        return self.put(kind, key, made)

    def find(self, kind: str, key: Mapping[str, Any]) -> Arrays | None:
        """The stored arrays, memory-mapped and read-only, or None. A damaged entry is removed."""
        target = self._path(kind, key)
        if target is None or not target.is_dir():
            return None
        try:
            return read_arrays(target)
        except (ValueError, EOFError, KeyError, TypeError, AttributeError, OSError, BadInput) as error:
            self.progress.say(f"cached {kind} is damaged and is made again ({target}: {error})")
            shutil.rmtree(target, ignore_errors=True)
            return None

    def put(self, kind: str, key: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Stores the arrays and returns them as `find` would; the arrays themselves without a cache folder."""
        target = self._path(kind, key)
        if target is None:
            return dict(arrays)
        try:
            with draft_folder(target) as draft:
                write_arrays(draft, key, arrays)
        except BadInput:
            if not target.is_dir():
                raise
            # Another process has stored the same entry meanwhile; it is never replaced under those who read it.
        return read_arrays(target)

    def _path(self, kind: str, key: Mapping[str, Any]) -> Path | None:
        return self.folder / f"{kind}-{hash_json({'kind': kind, **key})[:32]}" if self.folder else None


def write_arrays(folder: Path, key: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Each array as `NAME.npy`, and an index of shapes and sizes beside them."""
    index = {}
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        index[name] = {"shape": list(array.shape), "dtype": array.dtype.str, "bytes": path.stat().st_size}
    write_json(folder / _INDEX, {"key": dict(key), "arrays": index})


def read_arrays(folder: Path) -> Arrays:
    """The arrays, memory-mapped. Raises one of many errors where a file is missing, cut short or of another shape."""
    arrays: Arrays = {}
    for name, stored in read_json(folder / _INDEX)["arrays"].items():
        path = folder / f"{name}.npy"
        if path.stat().st_size != stored["bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {stored['bytes']}")
        # An empty file cannot be memory-mapped.
        array = np.load(path, mmap_mode="r" if np.prod(stored["shape"]) else None, allow_pickle=False)
        if list(array.shape) != stored["shape"] or array.dtype.str != stored["dtype"]:
            raise ValueError(f"{path.name} is {array.dtype.str} {array.shape}, not {stored['dtype']} {stored['shape']}")
        arrays[name] = array
    return arrays
