"""`xpert cluster`: the clusters of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.features import FeatureOptions
from xpert.pool_build import PoolOptions

__all__ = ["command"]


@click.command("cluster")
@click.argument("pool", metavar="POOL")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@config_options(FeatureOptions)
@config_options(PoolOptions)
@common_options
def command(session: Session, pool: str, out: Path, **options: Any) -> None:
    """Embeds and clusters POOL (a pool folder or any source), and names each cluster by its telling terms.

    The folder holds clusters.jsonl, labels.npy (the cluster of each pool row), centroids.npy, manifest.json and
    report.html. The options on reading (--format, --map, ...) apply where POOL is a source, not a pool folder.
    """
    from xpert.cluster_folder import cluster_pool

    feature_options, pool_options = take(FeatureOptions, options), take(PoolOptions, options)
    found = cluster_pool(
        pool,
        out=out,
        features=feature_options,
        pool_options=pool_options,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    sizes = found.clusters.sizes
    biggest = (-sizes).argsort(kind="stable")[:10].tolist()
    rows = [{"cluster": c, "size": int(sizes[c]), "terms": found.clusters.terms[c]} for c in biggest]
    lines = [f"{len(found.clusters.labels):,} rows in {len(found.clusters):,} clusters"]
    lines += [f"{row['size']:>8,}  {', '.join(row['terms'])}" for row in rows]
    if len(found.clusters) > len(rows):
        lines.append(f"     and {len(found.clusters) - len(rows):,} smaller ones")
    session.result(
        {"path": str(found.path), **found.manifest["figures"], "biggest_clusters": rows},
        "\n".join([*lines, str(found.path)]),
    )
