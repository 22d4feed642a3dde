"""Several methods on the same pool, shots and budget, beside random draws: one folder, one page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, unknown
from xpert.progress import SILENT, Progress
from xpert.records import Budget, Shots
from xpert.selection import check_answers, open_method, select
from xpert.selection_folder import SelectionFolder
from xpert.storage import MANIFEST, check_output, read_json, write_manifest

if TYPE_CHECKING:
    from xpert.data import Pool, PoolOptions
    from xpert.features import FeatureOptions, Features

__all__ = ["CONTROLS", "Comparison", "compare", "split_params"]

CONTROLS = 3
"""Random draws beside the methods."""
_TARGETS = 2000


@dataclass(frozen=True)
class Comparison:
    """Selections by name (methods first, then the random draws), their figures, and how far they overlap.

    `overlap` [m, m]: the share of the smaller selection's rows that stand in the other one too.
    """

    path: Path
    selections: Mapping[str, SelectionFolder]
    figures: Mapping[str, Mapping[str, Any]]
    overlap: NDArray[np.float64]


def compare(
    pool: Pool | Path | str,
    methods: Sequence[str],
    *,
    budget: Budget | str,
    out: Path | str,
    shots: Shots | Path | str | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    features: FeatureOptions | None = None,
    pool_options: PoolOptions | None = None,
    seed: int = 0,
    device: str = "auto",
    executor: str = "local",
    workers: int | None = None,
    report: bool = True,
    progress: Progress = SILENT,
) -> Comparison:
    """Selects by each method, and at random by three seeds, into subfolders of `out`, and writes what they share.

    A method's folder is a selection like any other. Stopped, the same call goes on with the methods that are
    missing. `params` are per method. Raises BadInput as `select`, before any method is run.
    """
    from xpert.data import open_pool, read_shots
    from xpert.features import FeatureOptions

    out = Path(out)
    names = _names(methods)
    stray = set(params or {}) - set(methods)
    if stray:
        raise unknown("method in the parameters", min(stray), methods)
    selectors = {method: open_method(method, (params or {}).get(method, {}))[0] for method in methods}
    if not _is_ours(out):
        check_output(out)
    if isinstance(pool, str | Path):
        pool = open_pool(pool, options=pool_options, progress=progress)
    given = read_shots(shots, need_answers=False) if isinstance(shots, str | Path) else shots
    for method, selector in selectors.items():
        if given and "answers" in selector.needs:
            check_answers(method, given)
    options = features or FeatureOptions()
    jobs = [(name, method, (params or {}).get(method, {}), seed) for name, method in names.items()]
    jobs += [(f"random-{draw + 1}", "random", {}, seed + draw) for draw in range(CONTROLS)]
    out.mkdir(parents=True, exist_ok=True)
    selections, costs = {}, _known_costs(out)
    for name, method, given_params, own_seed in jobs:
        progress.say(f"selecting by {name}")
        kept = (out / name / MANIFEST).is_file()
        started = time.process_time()
        selections[name] = select(
            pool, budget=budget, out=out / name, shots=given, method=method, params=given_params, features=options,
            seed=own_seed, device=device, executor=executor, workers=workers, report=False, progress=progress,
        )  # fmt: skip
        if not kept:  # to find a selection again costs nothing, and is not what its method cost
            costs[name] = time.process_time() - started
    return _write(out, pool, given, options, selections, costs, seed=seed, device=device, report=report)


def split_params(params: Mapping[str, str], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """`{"kmq.share": "equal"}` as `{"kmq": {"share": "equal"}}`. Raises BadInput for a key without its method."""
    found: dict[str, dict[str, str]] = {}
    for key, value in params.items():
        method, dot, name = key.rpartition(".")
        if not dot:
            raise BadInput(f"parameter {key!r} does not say of which method", hint=f"write {methods[0]}.{key}={value}")
        if method not in methods:
            raise unknown("method in the parameters", method, methods)
        found.setdefault(method, {})[name] = value
    return found


def _names(methods: Sequence[str]) -> dict[str, str]:
    """Folder name -> method; a pipeline's folder is named by its file."""
    names: dict[str, str] = {}
    for method in methods:
        name = Path(method).stem if method.endswith((".yaml", ".yml")) else method
        if name in names or name in {f"random-{draw + 1}" for draw in range(CONTROLS)}:
            raise BadInput(f"method {name!r} is named twice", hint="name each once; random draws are added anyway")
        names[name] = method
    return names


def _known_costs(out: Path) -> dict[str, float]:
    """CPU seconds by name that an earlier comparison in the folder measured."""
    return dict(read_json(out / MANIFEST)["timings"]) if (out / MANIFEST).is_file() else {}


def _is_ours(out: Path) -> bool:
    """Whether the folder holds a comparison, or the selections of one that was stopped."""
    if not out.is_dir():
        return False
    if (out / MANIFEST).is_file():
        manifest = read_json(out / MANIFEST)
        return isinstance(manifest, dict) and manifest.get("kind") == "comparison"
    inside = list(out.iterdir())
    return bool(inside) and all((path / MANIFEST).is_file() or path.name.startswith(".") for path in inside)


def _write(
    out: Path,
    pool: Pool,
    shots: Shots | None,
    options: FeatureOptions,
    selections: Mapping[str, SelectionFolder],
    costs: Mapping[str, float],
    *,
    seed: int,
    device: str,
    report: bool,
) -> Comparison:
    from xpert.features import Features

    features = Features(pool, options, shots=shots, device=device, seed=seed)
    places = {key: place for place, key in enumerate(pool.ids())}
    rows = {
        name: np.array([places[mark["id"]] for mark in found.marks()], dtype=np.int64)
        for name, found in selections.items()
    }
    figures = {
        name: {**_measures(features, rows[name], shots), **_told(found, costs.get(name))}
        for name, found in selections.items()
    }
    overlap = np.array([[_overlap(one, two) for two in rows.values()] for one in rows.values()])
    comparison = Comparison(out, selections, figures, overlap)
    written = json.loads(json.dumps(figures))
    if report:
        from xpert.report.comparison_report import write_comparison_report

        write_comparison_report(out / "report.html", comparison, pool_rows=len(pool))
    write_manifest(
        out,
        "comparison",
        inputs={"pool": pool.fingerprint, "shots": shots.fingerprint if shots else None},
        config={"methods": list(selections), "features": options.to_dict()},
        seed=seed,
        figures={"methods": written, "overlap": overlap.round(6).tolist()},
        timings={name: costs[name] for name in selections if name in costs},
    )
    return comparison


def _measures(features: Features, rows: NDArray[np.int64], shots: Shots | None) -> dict[str, Any]:
    """How near the rows are to the shots, how alike among themselves, and how well they stand for the pool.

    `alike` is the mean cosine of two different rows; `coverage` the mean over pool rows (2,000 of them at most, evenly
    spaced) of the greatest cosine with a chosen row.
    """
    from xpert.similarity import max_similarity

    embeddings = features.embeddings()
    chosen = embeddings[rows].astype(np.float64)
    lengths = (chosen**2).sum()
    pairs = len(rows) * (len(rows) - 1)
    targets = embeddings[np.unique(np.linspace(0, len(embeddings) - 1, _TARGETS).astype(np.int64))]
    found: dict[str, Any] = {
        "alike": round(float(((chosen.sum(axis=0) ** 2).sum() - lengths) / pairs), 6) if pairs else None,
        "coverage": round(float(max_similarity(targets, embeddings[rows])[0].mean()), 6),
        "clusters": len(np.unique(features.clusters().labels[rows])),
    }
    if shots:
        found["shot_similarity"] = round(float((embeddings[rows] @ features.shot_embeddings().T).max(axis=1).mean()), 6)
    return found


def _told(found: SelectionFolder, seconds: float | None) -> dict[str, Any]:
    """What a selection's own manifest and log say; no CPU seconds where it was made by a run that was stopped."""
    scored = [entry["scored"] for entry in found.log() if entry.get("step") == "evaluations"]
    return {
        "rows": found.figures["rows"],
        "tokens": found.figures["tokens"],
        "skills": dict(found.figures["skills"]),
        "cpu_seconds": None if seconds is None else round(seconds, 2),
        "select_seconds": round(found.manifest["timings"].get("select", 0.0), 2),
        "rows_scored": scored[-1] if scored else None,
    }


def _overlap(one: NDArray[np.int64], two: NDArray[np.int64]) -> float:
    return len(np.intersect1d(one, two)) / min(len(one), len(two))
