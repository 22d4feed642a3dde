"""The report of a clustering: a map of the pool coloured by cluster, and the clusters with their telling terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert.report.page import histogram, write_page
from xpert.report.selection_report import project

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["write_cluster_report"]

MAP_POINTS = 1500
COLOURED = 12
FIGURES = ("rows", "clusters", "biggest", "smallest", "mean_cosine_to_centroid")
CLIP = 220


def write_cluster_report(
    path: Path, *, features: Features, lines: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> None:
    """Writes `report.html`, one self-contained file. `lines` are those of clusters.jsonl, biggest cluster first.

    Cost: a t-SNE of at most 1,500 sampled rows (about 5 s of CPU), whatever the size of the pool.
    """
    pool, clusters = features.pool, features.clusters()
    shown = np.arange(len(pool))
    if len(shown) > MAP_POINTS:
        shown = np.sort(np.random.default_rng(0).choice(shown, MAP_POINTS, replace=False))
    place_of = {line["cluster"]: place for place, line in enumerate(lines)}
    placed = (project(features.embeddings()[shown]) * 1000).round().astype(int).tolist()
    points = [
        [x, y, place_of[int(clusters.labels[row])], _clip(prompt)]
        for (x, y), row, prompt in zip(placed, shown.tolist(), _prompts(features, shown.tolist()), strict=True)
    ]
    write_page(
        path,
        "clusters.html.jinja",
        title=f"{len(lines):,} clusters",
        lead=f"{len(pool):,} rows, embedded by {features.options.embedder} ({features.options.embed_field})",
        figures=[(name.replace("_", " "), manifest["figures"][name]) for name in FIGURES],
        points=points,
        names=[", ".join(line["terms"][:3]) or f"cluster {line['cluster']}" for line in lines],
        coloured=COLOURED,
        map_note=f"{len(points):,} of {len(pool):,} rows, placed by t-SNE of their embeddings; the "
        f"{min(COLOURED, len(lines))} biggest clusters are coloured. Near means alike; far says little.",
        size_chart=histogram({"clusters": ("var(--chosen)", clusters.sizes)}, unit="rows in the cluster"),
        clusters=[
            {
                **line,
                "terms": ", ".join(line["terms"]) or "–",
                "example": _clip(prompt),
                "width": f"{100 * line['size'] / lines[0]['size']:.1f}",
            }
            for line, prompt in zip(lines, _prompts(features, [line["central_rows"][0] for line in lines]), strict=True)
        ],
        manifest=json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _prompts(features: Features, rows: Sequence[int]) -> list[str]:
    return [row.prompt for row in features.pool.rows(rows)]


def _clip(text: str) -> str:
    return text if len(text) <= CLIP else text[: CLIP - 1] + "…"
