"""The report of a selection: a map of the pool, scores, clusters, lengths, and samples of the best and just-missed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats, Selection
from xpert.records import Shots
from xpert.report.page import bars, histogram, write_page

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["project", "write_selection_report"]

MAP_POINTS = 1500
SAMPLES = 12
CLUSTERS_SHOWN = 25
CLIP = 600


def write_selection_report(
    path: Path, *, features: Features, selection: Selection, shots: Shots | None, manifest: Mapping[str, Any]
) -> None:
    """Writes `report.html`, one self-contained file.

    Cost: a t-SNE of at most 1,500 sampled rows (about 5 s of CPU), whatever the size of the pool.
    """
    config, figures = manifest["config"], manifest["figures"]
    clusters, left = _clusters(features, selection)
    points, note = _points(features, selection, shots)
    skills = Counter(skill for skill in _at(features.pool.skills(), selection.rows) if skill)
    write_page(
        path,
        "selection.html.jinja",
        title=f"Selection by {config['method']}",
        lead=f"{len(selection.rows):,} of {len(features.pool):,} rows, budget {config['budget']}"
        + (f", anchored on {len(shots)} shots" if shots else ""),
        figures=[(name.replace("_", " "), value) for name, value in figures.items() if isinstance(value, int | float)],
        points=points,
        map_note=note,
        score_chart=_score_chart(selection),
        length_chart=histogram(
            {
                "pool": ("var(--pool)", features.lengths()),
                "chosen": ("var(--chosen)", features.lengths()[selection.rows]),
            },
            unit=f"{features.lengths_unit}, logarithmic axis",
            log=True,
        ),
        clusters=clusters,
        clusters_left=left,
        skill_bars=bars([(s, n, f"{n:,} ({n / len(selection.rows):.0%})") for s, n in skills.most_common(20)])
        if skills
        else "",
        shots=[{"prompt": _clip(shot.prompt), "response": _clip(shot.response)} for shot in shots or ()],
        best=[
            _sample(features, int(row), float(selection.scores[i]), selection.reasons[i])
            for i, row in enumerate(selection.rows[:SAMPLES])
        ],
        missed=_missed(features, selection),
        pulls=_pulls(features, selection),
        manifest=json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False),
    )


def project(vectors: Floats, seed: int = 0) -> NDArray[np.float64]:
    """[n, d] -> [n, 2] in 0..1: t-SNE (van der Maaten & Hinton 2008) from a PCA start; PCA alone under 30 rows."""
    count, width = vectors.shape
    if count < 3 or width < 2:
        return np.full((count, 2), 0.5)
    centred = np.asarray(vectors, dtype=np.float64) - vectors.mean(axis=0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ right[: min(50, width)].T
    if count >= 30 and singular[0] > 0:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (count - 1) / 4)
        placed = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(flat)
    else:
        placed = flat[:, :2]
    low, high = np.quantile(placed, [0.002, 0.998], axis=0)
    return np.asarray(np.clip((placed - low) / np.maximum(high - low, 1e-12), 0, 1), dtype=np.float64)


def _points(features: Features, selection: Selection, shots: Shots | None) -> tuple[dict[str, list[Any]], str]:
    """Points of the map as [x, y, text] in thousandths, and the sentence that says what was sampled."""
    rng = np.random.default_rng(0)
    chosen = np.asarray(selection.rows)
    if len(chosen) > MAP_POINTS // 2:
        chosen = np.sort(rng.choice(chosen, MAP_POINTS // 2, replace=False))
    others = np.setdiff1d(np.arange(len(features.pool)), selection.rows)
    room = MAP_POINTS - len(chosen)
    if len(others) > room:
        others = np.sort(rng.choice(others, room, replace=False))
    vectors = [features.embeddings()[others], features.embeddings()[chosen]]
    if shots:
        vectors.append(features.shot_embeddings())
    placed = (project(np.concatenate(vectors).astype(np.float32)) * 1000).round().astype(int).tolist()
    texts = [_tip(features.pool.row(int(i))) for i in (*others, *chosen)] + [_tip(shot) for shot in shots or ()]
    points = [[x, y, text] for (x, y), text in zip(placed, texts, strict=True)]
    first, second = len(others), len(others) + len(chosen)
    note = (
        f"{len(others):,} of {len(features.pool) - len(selection.rows):,} rows not taken and {len(chosen):,} of "
        f"{len(selection.rows):,} taken, placed by t-SNE of their embeddings ({features.options.embedder}). "
        "Near means alike; far says little."
    )
    return {"pool": points[:first], "chosen": points[first:second], "shots": points[second:]}, note


def _clusters(features: Features, selection: Selection) -> tuple[list[dict[str, Any]], str]:
    found = features.clusters()
    sizes = np.bincount(found.labels, minlength=len(found.centroids))
    taken = np.bincount(found.labels[selection.rows], minlength=len(found.centroids))
    order = np.lexsort((-sizes, -taken))
    rows = [
        {
            "terms": ", ".join(found.terms[c]),
            "size": int(sizes[c]),
            "taken": int(taken[c]),
            "share": float(taken[c] / max(1, taken.sum())),
        }
        for c in order[:CLUSTERS_SHOWN]
        if sizes[c]
    ]
    rest = order[CLUSTERS_SHOWN:]
    left = f"{len(rest)} more clusters gave {int(taken[rest].sum())} rows." if len(rest) else ""
    return rows, left


def _pulls(features: Features, selection: Selection) -> dict[str, Any] | None:
    """What a bandit pulled, from its log: most pulled arms first; None for other methods."""
    total = next((entry for entry in selection.log if entry.get("step") == "evaluations"), None)
    if total is None:
        return None
    arms = sorted(
        (entry for entry in selection.log if entry.get("step") == "arm"), key=lambda arm: (-arm["pulls"], arm["arm"])
    )
    terms = features.clusters().terms
    worth = [arm["mean reward"] for arm in arms if arm["mean reward"] is not None]
    low, high = min(worth, default=0.0), max(worth, default=0.0)
    rows = [
        {
            **arm,
            "terms": ", ".join(terms[arm["arm"]]),
            "mean": arm["mean reward"],
            "place": None if arm["mean reward"] is None else (arm["mean reward"] - low) / ((high - low) or 1.0),
        }
        for arm in arms[:CLUSTERS_SHOWN]
    ]
    rest = arms[CLUSTERS_SHOWN:]
    left = f"{len(rest)} more clusters were pulled {sum(arm['pulls'] for arm in rest):,} times." if rest else ""
    return {"arms": rows, "left": left, **total}


def _score_chart(selection: Selection) -> Any:
    groups: dict[str, tuple[str, Any]] = {}
    if selection.pool_scores is not None:
        groups["pool"] = ("var(--pool)", selection.pool_scores)
        groups["chosen"] = ("var(--chosen)", selection.pool_scores[selection.rows])
    elif len(selection.scores) and float(np.ptp(selection.scores)) > 0:
        groups["chosen"] = ("var(--chosen)", selection.scores)
    return histogram(groups, unit="score")


def _missed(features: Features, selection: Selection) -> list[dict[str, Any]]:
    if selection.pool_scores is None:
        return []
    scores = np.where(np.isfinite(selection.pool_scores), selection.pool_scores, -np.inf)
    scores[selection.rows] = -np.inf
    order = np.argsort(-scores, kind="stable")[:SAMPLES]
    # A bandit may have taken rows that it never scored.
    taken = selection.pool_scores[selection.rows]
    worst = float(np.nanmin(taken)) if np.isfinite(taken).any() else np.inf
    return [
        _sample(
            features,
            int(row),
            float(scores[row]),
            "repeats or overlaps a row taken or a shot" if scores[row] > worst else "below the last row taken",
        )
        for row in order
        if np.isfinite(scores[row])
    ]


def _sample(features: Features, index: int, score: float, reason: str) -> dict[str, Any]:
    row = features.pool.row(index)
    return {
        "score": score if np.isfinite(score) else None,
        "prompt": _clip(row.prompt),
        "response": _clip(row.response),
        "reason": reason,
        "skill": row.skill,
    }


def _tip(row: Any) -> str:
    return f"{_clip(row.prompt, 220)}\n→ {_clip(row.response, 100)}"


def _clip(text: str, most: int = CLIP) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _at(values: Sequence[Any], rows: NDArray[np.int64]) -> list[Any]:
    return [values[int(row)] for row in rows]
