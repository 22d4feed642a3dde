"""Data in: the public face of everything that turns files into pools, shots, prompts and suites."""

from __future__ import annotations

from pathlib import Path

from xpert.errors import BadInput
from xpert.overlap import overlapping_rows
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
    "overlapping_rows",
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
    """A pool folder as it is, or the pool of any other source: built once into the user's cache, found there by the
    source's content and `options`. A pool folder takes no options: it is built already.

    With `shots`, rows that overlap them are left out of the pool, which then is a view in memory with a fingerprint of
    its own; to keep features shared between tasks, mask the rows of `overlapping_rows` instead. Raises BadInput where
    nothing but the shots is in the pool.
    """
    path = Path(source)
    ready = path.is_dir() and is_pool(path)
    if ready and options not in (None, PoolOptions()):
        raise BadInput("the pool is built already, so it takes no options", where=str(source), hint="build it anew")
    pool = Pool.open(path) if ready else _cached(source, options or PoolOptions(), progress)
    if shots is None:
        return pool
    rest = pool.without(overlapping_rows(pool, shots)[0])
    if not len(rest):
        raise BadInput(
            f"all {len(pool):,} rows overlap the shots",
            where=str(source),
            hint="add rows to the pool that are not shots",
        )
    return rest


def _cached(source: str | Path, options: PoolOptions, progress: Progress) -> Pool:
    opened = open_source(source)
    key = hash_json([_CODE, opened.name, opened.fingerprint(), options.to_dict()])
    folder = cache_folder() / "pools" / key[:32]
    if not folder.is_dir():
        # Where another process builds the same pool at this moment, the later one replaces it by its equal.
        build_pool([source], folder, options, progress=progress, replace=True)
    return Pool.open(folder)
