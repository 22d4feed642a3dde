"""Data in: the public face of everything that turns files into pools, shots, prompts and suites."""

from __future__ import annotations

from pathlib import Path

from xpert.errors import BadInput
from xpert.pool import POOL_SCHEMA, Pool, is_pool, pool_from_rows
from xpert.pool_build import PoolOptions, build_pool
from xpert.progress import SILENT, Progress
from xpert.readers import open_source
from xpert.records import Shots
from xpert.row_files import METRICS, Suite, read_prompts, read_rows, read_shots, read_suite
from xpert.storage import cache_folder, hash_json

__all__ = [
    "METRICS",
    "POOL_SCHEMA",
    "Pool",
    "PoolOptions",
    "Suite",
    "build_pool",
    "open_pool",
    "pool_from_rows",
    "read_prompts",
    "read_rows",
    "read_shots",
    "read_suite",
]

_CODE = 1  # raise it when the same source gives another pool


def open_pool(
    source: str | Path,
    *,
    options: PoolOptions | None = None,
    shots: Shots | None = None,
    progress: Progress = SILENT,
) -> Pool:
    """A pool folder, or the pool of any source, built once into the user's cache (keyed by content and options)."""
    path = Path(source)
    if path.is_dir() and is_pool(path):
        pool = Pool.open(path)
    else:
        pool = _cached(source, options or PoolOptions(), progress)
    return pool


def _cached(source: str | Path, options: PoolOptions, progress: Progress) -> Pool:
    opened = open_source(source)
    key = hash_json([_CODE, opened.name, opened.fingerprint(), options.to_dict()])
    folder = cache_folder() / "pools" / key[:32]
    if not folder.is_dir():
        try:
            build_pool([source], folder, options, progress=progress)
        except BadInput:
            if not folder.is_dir():  # another process may have built it meanwhile
                raise
    return Pool.open(folder)
