"""Which rows of an unlabelled pool to label, so that they may be the shots of a task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert import plugins
from xpert.errors import BadInput
from xpert.overlap import same_text_key
from xpert.pool import Pool, is_pool, pool_from_rows
from xpert.progress import SILENT, Progress
from xpert.records import Budget, Row
from xpert.row_files import read_rows
from xpert.row_forms import parse_mapping
from xpert.selection import choose
from xpert.shot_files import check_shot_file, unlabelled_lines, write_shot_file
from xpert.storage import manifest_value

if TYPE_CHECKING:
    from xpert.features import FeatureOptions

__all__ = ["PickedRows", "open_unlabelled", "pick_rows"]

_READERS = {"base", "lengths", "judge"}  # what scorers of answers need


@dataclass(frozen=True)
class PickedRows:
    """Rows to label, most wanted first, with scores and reasons; `figures` count the pool, `log` is the method's."""

    rows: Sequence[Row]
    scores: Sequence[float]
    reasons: Sequence[str]
    figures: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


def pick_rows(
    pool: Pool | Path | str,
    *,
    count: int,
    method: str = "kcenter",
    params: Mapping[str, Any] | None = None,
    features: FeatureOptions | None = None,
    form: str | None = None,
    mapping: Sequence[str] = (),
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> PickedRows:
    """Picks `count` rows of a pool, whose rows need no answers, by any selector that needs no shots.

    Rows that ask the same text as an earlier one are left out: nobody should label a question twice. With `out` the
    rows are written as JSON lines with an empty answer to fill in, and a manifest beside them. Raises BadInput where
    the method needs shots, where it reads answers and there are none, and where the pool holds fewer rows.
    """
    from xpert.features import FeatureOptions, Features

    target = Path(out) if out is not None else None
    if target is not None:
        check_shot_file(target)
    selector_class = plugins.load("selector", method)
    options = selector_class.Options.from_mapping(dict(params or {}), where=f"method {method}")
    selector = selector_class(options)
    if "shots" in selector_class.needs:
        raise BadInput(
            f"method {method!r} needs shots, and here they are still to be labelled",
            hint="use one that needs none, such as kcenter, facility or random",
        )
    feature_options = features or FeatureOptions()
    whole, repeats = open_unlabelled(pool, form=form, mapping=mapping)
    _check_answers(whole, method, selector_class.needs, feature_options)
    if count > len(whole):
        also = f" (and {repeats:,} that repeat one)" if repeats else ""
        raise BadInput(f"{count:,} rows are asked for, but the pool holds {len(whole):,}{also}", hint="lower --count")
    computed = Features(whole, feature_options, device=device, seed=seed, progress=progress)
    started = time.perf_counter()
    found = choose(selector, computed, None, Budget(count, "rows"), seed=seed)
    if found.pool_scores is not None and np.isnan(found.pool_scores).all():
        raise BadInput(f"method {method!r} could score no row: {found.reasons[0]}")
    figures = {
        "rows": len(found.rows),
        "pool_rows": len(whole),
        "repeats_left_out": repeats,
    }
    rows = whole.rows(found.rows.tolist())
    picked = PickedRows(rows, found.scores.tolist(), found.reasons, figures, found.log)
    if target is not None:
        manifest = manifest_value(
            "shots to label",
            inputs={"pool": whole.fingerprint},
            config={
                "method": method,
                "params": options.to_dict(),
                "count": count,
                "features": feature_options.to_dict(),
            },
            seed=seed,
            figures={**figures, "log": list(found.log)},
            timings={"pick": time.perf_counter() - started},
        )
        write_shot_file(target, unlabelled_lines(rows, picked.scores, picked.reasons), manifest)
    return picked


def open_unlabelled(
    pool: Pool | Path | str, *, form: str | None = None, mapping: Sequence[str] = ()
) -> tuple[Pool, int]:
    """A pool folder, or the rows of any source, answers or not; without repeats, and how many these were.

    A repeat asks the same text as an earlier row but for case, spaces and punctuation at the ends. Sources are read
    into memory.
    """
    if not isinstance(pool, Pool):
        path = Path(pool)
        if path.is_dir() and is_pool(path):
            if form is not None or mapping:
                raise BadInput("the pool is built already, so it takes no options", where=str(pool))
            pool = Pool.open(path)
        else:
            rows = read_rows(str(pool), form=form, mapping=parse_mapping(mapping), need_answer=False)
            pool = pool_from_rows(rows)
    seen: set[str] = set()
    repeats = []
    for index, prompt in enumerate(pool.prompts()):
        key = same_text_key(prompt)
        if key in seen:
            repeats.append(index)
        seen.add(key)
    return pool.without(repeats), len(repeats)


def _check_answers(pool: Pool, method: str, needs: frozenset[str], options: FeatureOptions) -> None:
    """Refuses what would read the answers of rows that have none, and so rank them by nothing."""
    if any(pool.responses()):
        return
    if options.embed_field != "prompt":
        raise BadInput(f"the rows have no answers, so --embed-field {options.embed_field} has nothing to embed")
    if needs & _READERS and method in plugins.names("scorer"):
        raise BadInput(
            f"method {method!r} scores answers, and the rows have none",
            hint="use a method that reads prompts, such as kcenter, facility or random",
        )
