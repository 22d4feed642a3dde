"""Selecting from a pool: the one function that opens the inputs, runs a method and writes the selection."""

from __future__ import annotations

import importlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.budgeting import BudgetMeter
from xpert.eligible import EligibleFeatures
from xpert.errors import BadInput
from xpert.model_files import model_fingerprint
from xpert.progress import SILENT, Progress
from xpert.protocols import Selection, Selector
from xpert.records import Budget, Row, Shots
from xpert.selection_folder import (
    LEFT_OUT,
    LOG,
    REPORT,
    ROWS,
    SELECTED,
    SHOTS,
    SelectionFolder,
    read_selection,
    write_jsonl,
    write_rows,
)
from xpert.storage import MANIFEST, check_output, draft_folder, hash_file, read_json, write_manifest

if TYPE_CHECKING:
    from xpert.data import Pool, PoolOptions
    from xpert.features import FeatureOptions, Features

__all__ = ["SelectionFolder", "check_answers", "choose", "open_method", "read_selection", "select"]


def select(
    pool: Pool | Path | str,
    *,
    budget: Budget | str,
    out: Path | str,
    shots: Shots | Path | str | None = None,
    method: str = "kshot",
    params: Mapping[str, Any] | None = None,
    features: FeatureOptions | None = None,
    pool_options: PoolOptions | None = None,
    seed: int = 0,
    device: str = "auto",
    executor: str = "local",
    workers: int | None = None,
    report: bool = True,
    progress: Progress = SILENT,
) -> SelectionFolder:
    """Selects rows of `pool` by `method` and writes them to the folder `out`.

    Rows that overlap the shots are never chosen. Shots may lack answers, where the method reads none. The same inputs,
    configuration and seed give the same rows, and a folder that holds them already is recognised and read instead.
    Without `report` no page is written, and clusters are computed only for a method that reads them. Raises BadInput
    where the inputs, the method's parameters or the budget do not fit, and where `out` holds something else.
    """
    from xpert.data import open_pool, overlapping_rows, read_shots
    from xpert.features import FeatureOptions, Features

    out = Path(out)
    parsed = Budget.parse(budget) if isinstance(budget, str) else budget
    selector, written = open_method(method, params or {})
    given = read_shots(shots, need_answers=False) if isinstance(shots, str | Path) else shots
    if "shots" in selector.needs and not given:
        raise BadInput(f"method {method!r} needs shots", hint="give the examples of the task by --shots FILE")
    if given and given.unanswered:
        if "answers" in selector.needs:
            check_answers(method, given)
        progress.say(
            f"{len(given.unanswered):,} of {len(given):,} shots have no answer: they steer the selection, and nothing "
            "will be trained on them"
        )
    if not _is_selection(out):
        check_output(out)
    feature_options = features or FeatureOptions()
    if isinstance(pool, str | Path):
        pool = open_pool(pool, options=pool_options, progress=progress)
    run = _Run(
        inputs={
            "pool": pool.fingerprint,
            "shots": given.fingerprint if given else None,
            "base": model_fingerprint(feature_options.base) if feature_options.base else None,
        },
        config={
            "method": method,
            "params": written,
            "budget": str(parsed),
            "features": feature_options.to_dict(),
            "report": report,
        },
        seed=seed,
        needs_clusters="clusters" in selector.needs,
    )
    if _is_selection(out):
        return _reuse(out, run, progress)

    excluded, why = overlapping_rows(pool, given) if given else (np.empty(0, dtype=np.int64), [])
    whole = Features(
        pool,
        feature_options,
        shots=given,
        device=device,
        seed=seed,
        progress=progress,
        executor=executor,
        workers=workers,
    )
    started = time.perf_counter()
    selection = choose(selector, whole, given, parsed, seed=seed, excluded=excluded)
    # What the method asked of the features is counted there.
    run.timings["select"] = time.perf_counter() - started - sum(whole.timings.values())
    with draft_folder(out) as draft:
        if len(excluded):
            left_out = zip(pool.take(excluded)["id"].to_pylist(), why, strict=True)
            write_jsonl(draft / LEFT_OUT, [{"id": key, "reason": reason} for key, reason in left_out])
        _write(draft, run, whole, selection, given, excluded=len(excluded), report=report)
    return read_selection(out)


def open_method(method: str, params: Mapping[str, Any]) -> tuple[Selector, Any]:
    """A method's selector, and its parameters with every default as plain JSON.

    `method` is a plug-in's name, or a pipeline: a `.yaml` file of steps, which takes no parameters beside its own.
    """
    if method.endswith((".yaml", ".yml")):
        if params:
            raise BadInput("a pipeline takes no --param", where=method, hint="write `params:` into its steps")
        # By its name, since toolkit imports no selector.
        pipeline = importlib.import_module("xpert.selectors._pipeline").read_pipeline(method)
        return pipeline, pipeline.written()
    selector_class = plugins.load("selector", method)
    options = selector_class.Options.from_mapping(dict(params), where=f"method {method}")
    return selector_class(options), options.to_dict()


def choose(
    selector: Selector,
    features: Features,
    shots: Shots | None,
    budget: Budget,
    *,
    seed: int = 0,
    excluded: Sequence[int] | NDArray[np.int64] = (),
) -> Selection:
    """Runs a selector on all rows but `excluded`, and checks what it gives; writes nothing.

    Raises BadInput where the budget is more than the rows that are left hold, ValueError where the selector breaks
    its contract.
    """
    rows = len(features.pool)
    gone = np.unique(np.asarray(excluded, dtype=np.int64))
    if len(gone) == rows:
        raise BadInput("every row of the pool overlaps the shots", hint="use a pool that holds other rows")
    view = cast("Features", EligibleFeatures(features, gone)) if len(gone) else features
    try:
        found = selector.select(view, shots, budget, np.random.default_rng(seed))
    except BadInput as error:
        if len(gone) and not error.where:
            error.where = f"pool without the {len(gone)} rows that overlap the shots"
        raise
    _check(found, len(view.pool), type(selector).__name__)
    _check_budget(found, budget, view, type(selector).__name__)
    if not len(gone):
        return found
    keep = np.setdiff1d(np.arange(rows, dtype=np.int64), gone)
    pool_scores = found.pool_scores
    if pool_scores is not None:
        spread = np.full(rows, np.nan, dtype=np.float32)
        spread[keep] = pool_scores
        pool_scores = spread
    return Selection(keep[found.rows], found.scores, found.reasons, found.log, pool_scores)


def check_answers(method: str, shots: Shots) -> None:
    """Refuses shots without answers, for a method that reads those."""
    if shots.unanswered:
        count = f"{len(shots.unanswered):,} of {len(shots):,} shots have none, as {shots.unanswered[0].id}"
        raise BadInput(
            f"method {method!r} reads the shots' answers, and {count}",
            hint="fill them in, or use a method that reads prompts alone, such as kshot, mmr or similarity",
        )


def _check(found: Selection, rows: int, name: str) -> None:
    """A selector of another distribution may be wrong: nothing it gives is written unseen."""
    chosen = found.rows
    if len(chosen) == 0:
        raise ValueError(f"{name} chose nothing")
    if len(np.unique(chosen)) != len(chosen) or chosen.min() < 0 or chosen.max() >= rows:
        raise ValueError(f"{name} chose a row twice, or one that is not in the pool")
    if not len(chosen) == len(found.scores) == len(found.reasons):
        raise ValueError(
            f"{name} gave {len(found.scores)} scores and {len(found.reasons)} reasons for {len(chosen)} rows"
        )
    if not np.all(np.isfinite(found.scores)):
        raise ValueError(f"{name} gave scores that are not finite")


def _check_budget(found: Selection, budget: Budget, features: Features, name: str) -> None:
    """No selector may take more than the budget; less is a choice it documents (`refill` off)."""
    meter = BudgetMeter.of(budget, len(features.pool), features.lengths() if budget.in_tokens else None)
    if not all(meter.take(int(row)) for row in found.rows):
        raise ValueError(f"{name} took more than the budget of {budget}")


@dataclass
class _Run:
    """What identifies a selection, and what is measured of it."""

    inputs: dict[str, Any]
    config: dict[str, Any]
    seed: int
    needs_clusters: bool

    def __post_init__(self) -> None:
        self.timings: dict[str, float] = {}

    def made(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the manifest is of a run like this one."""
        same = {"inputs": self.inputs, "config": json.loads(json.dumps(self.config)), "seed": self.seed}
        return all(manifest.get(key) == value for key, value in same.items())


def _is_selection(out: Path) -> bool:
    path = out / MANIFEST
    if not path.is_file():
        return False
    manifest = read_json(path)
    return isinstance(manifest, dict) and manifest.get("kind") == "selection"


def _reuse(out: Path, run: _Run, progress: Progress) -> SelectionFolder:
    found = read_selection(out)
    if not run.made(found.manifest):
        raise BadInput(
            "holds a selection of other inputs, options or seed", where=str(out), hint="choose another -o, or remove it"
        )
    progress.say(f"{out} holds this very selection already; nothing to do")
    return found


def _write(
    draft: Path,
    run: _Run,
    features: Features,
    selection: Selection,
    shots: Shots | None,
    *,
    excluded: int,
    report: bool,
) -> None:
    needs_clusters = report or run.needs_clusters
    labels = features.clusters().labels[selection.rows] if needs_clusters else None
    rows = features.pool.rows(selection.rows.tolist())
    write_jsonl(draft / SELECTED, _marked(rows, selection, labels))
    write_rows(draft / ROWS, rows)
    if shots:
        write_rows(draft / SHOTS, shots, columns=True)
    if selection.log:
        write_jsonl(draft / LOG, selection.log)
    figures = _figures(features, selection, rows, shots, excluded)
    figures["files"] = {path.name: hash_file(path) for path in sorted(draft.iterdir())}
    run.timings.update(features.timings)
    write_manifest(
        draft,
        "selection",
        inputs=run.inputs,
        config=run.config,
        seed=run.seed,
        figures=figures,
        timings=run.timings,
    )
    if report:
        from xpert.report.selection_report import write_selection_report

        manifest = read_json(draft / MANIFEST)
        write_selection_report(draft / REPORT, features=features, selection=selection, shots=shots, manifest=manifest)


def _marked(rows: Sequence[Row], selection: Selection, labels: NDArray[np.int32] | None) -> list[dict[str, Any]]:
    """The rows as their sources wrote them, with `_xpert`."""
    lines = []
    for rank, (row, score, reason) in enumerate(zip(rows, selection.scores, selection.reasons, strict=True)):
        mark = {
            "id": row.id,
            "rank": rank + 1,
            "score": round(float(score), 6),
            "reason": reason,
            "cluster": None if labels is None else int(labels[rank]),
        }
        lines.append({**row.columns, "_xpert": mark})
    return lines


def _figures(
    features: Features, selection: Selection, rows: Sequence[Row], shots: Shots | None, excluded: int
) -> dict[str, Any]:
    """What the manifest counts; tokens are supervised ones, in the features' unit."""
    figures: dict[str, Any] = {
        "rows": len(rows),
        "tokens": int(features.lengths()[selection.rows].sum()),
        "tokens_unit": features.lengths_unit,
        "pool_rows": len(features.pool),
        "excluded_as_shots": excluded,
        "skills": _counted(row.skill for row in rows),
        "licences": _counted(row.licence for row in rows),
        "sources": features.pool.sources,
    }
    if shots:
        # Only where the embeddings were asked for: a random draw alone does not need them.
        figures["shots"] = len(shots)
        if "embeddings" in features.timings:
            cosines = features.embeddings()[selection.rows] @ features.shot_embeddings().T
            figures["mean_similarity"] = round(float(cosines.max(axis=1).mean()), 6)
    return figures


def _counted(values: Any) -> dict[str, int]:
    """How often each value stands, most frequent first; rows without one are counted as `unknown`."""
    counts = Counter("unknown" if value is None else value for value in values)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
