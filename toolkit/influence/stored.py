"""Directions that rows are scored against, kept on disk so that a pass that reads them is small enough to be sent."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.array_cache import ArrayCache, Arrays
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.storage import hash_json

__all__ = ["StoredTargets", "kept_folder"]

_KIND = "influence-targets"


@dataclass(frozen=True)
class StoredTargets:
    """Arrays by layer or parameter name, in an array cache under `folder`; `fingerprint` is of what made them."""

    folder: Path
    key: Mapping[str, Any]

    @classmethod
    def make(
        cls, folder: Path, key: Mapping[str, Any], make: Callable[[], Arrays], progress: Progress = SILENT
    ) -> StoredTargets:
        """Makes the arrays unless they are there; `key` is plain JSON that determines them."""
        ArrayCache(folder, progress).get_or_make(_KIND, key, make)
        return cls(folder, key)

    @property
    def fingerprint(self) -> str:
        return hash_json(dict(self.key))

    def load(self) -> Arrays:
        """Raises BadInput where they are gone."""
        found = ArrayCache(self.folder).find(_KIND, self.key)
        if found is None:
            raise BadInput("what rows are scored against is gone", where=str(self.folder), hint="run it again")
        return found


def kept_folder(folder: Path | None, owner: object) -> Path:
    """`folder`, or one that lives as long as `owner`."""
    if folder is not None:
        return folder
    made = Path(tempfile.mkdtemp(prefix="xpert-"))
    weakref.finalize(owner, shutil.rmtree, made, ignore_errors=True)
    return made
