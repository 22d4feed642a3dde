"""The clusters of a pool as an artifact: `xpert cluster`.

manifest.json     kind "clusters"
clusters.jsonl    per cluster, biggest first: number, size, share of the pool, telling terms, ids of central rows
labels.npy        int32 [n]: the cluster of each pool row, in the pool's order
centroids.npy     float32 [k, d], rows of length 1
report.html
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from xpert.array_cache import ArrayCache
from xpert.clustering import Clusters
from xpert.embedding import FIELDS, FittedEmbedder, open_embedder
from xpert.errors import BadInput, Corrupt, NotFound
from xpert.features import FeatureOptions, Features
from xpert.pool import Pool
from xpert.pool_build import PoolOptions
from xpert.progress import SILENT, Progress
from xpert.protocols import Floats
from xpert.records import Row
from xpert.storage import (
    MANIFEST,
    cache_folder,
    check_output,
    draft_folder,
    read_json,
    read_manifest,
    write_file,
    write_manifest,
)

__all__ = ["ClusterFolder", "cluster_pool", "embed_like", "read_clusters"]

KIND = "clusters"
REPORT = "report.html"
_CENTRAL_ROWS = 5


@dataclass(frozen=True)
class ClusterFolder:
    """A clusters artifact as read back; centroids, sizes and terms go by cluster number."""

    path: Path
    clusters: Clusters
    manifest: Mapping[str, Any]


def cluster_pool(
    pool: Pool | str | Path,
    *,
    out: str | Path,
    features: FeatureOptions | None = None,
    pool_options: PoolOptions | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> ClusterFolder:
    """Embeds and clusters a pool (a pool, its folder, or any source) and writes the artifact to `out`.

    A folder that holds these very clusters already is recognised and read instead. Raises BadInput where the number
    of clusters does not fit the pool, and where `out` holds something else.
    """
    from xpert.data import open_pool
    from xpert.report.cluster_report import write_cluster_report

    out, options = Path(out), features or FeatureOptions()
    if not _holds_clusters(out):
        check_output(out)
    if isinstance(pool, str | Path):
        pool = open_pool(pool, options=pool_options, progress=progress)
    made_of: dict[str, Any] = {"inputs": {"pool": pool.fingerprint}, "config": options.to_dict(), "seed": seed}
    if _holds_clusters(out):
        found = read_clusters(out)
        if any(found.manifest.get(key) != value for key, value in made_of.items()):
            raise BadInput(
                "holds clusters of another pool, or by other options", where=str(out), hint="choose another -o"
            )
        progress.say(f"{out} holds these very clusters already; nothing to do")
        return found
    whole = Features(pool, options, seed=seed, device=device, progress=progress)
    clusters = whole.clusters()
    with draft_folder(out) as draft:
        lines = describe_clusters(pool, whole.embeddings(), clusters)
        write_file(draft / "clusters.jsonl", b"".join(orjson.dumps(line) + b"\n" for line in lines))
        write_file(draft / "labels.npy", _npy(clusters.labels))
        write_file(draft / "centroids.npy", _npy(clusters.centroids))
        figures = {
            "rows": len(pool),
            "clusters": len(clusters),
            "biggest": int(clusters.sizes.max()),
            "smallest": int(clusters.sizes.min()),
            "mean_cosine_to_centroid": round(_cohesion(whole.embeddings(), clusters), 6),
            "embedder": whole.describe()["embedder_identity"],
        }
        write_manifest(
            draft,
            KIND,
            inputs=made_of["inputs"],
            config=made_of["config"],
            seed=seed,
            figures=figures,
            timings=whole.timings,
        )
        write_cluster_report(draft / REPORT, features=whole, lines=lines, manifest=read_json(draft / MANIFEST))
    return read_clusters(out)


def read_clusters(folder: str | Path) -> ClusterFolder:
    """Raises BadInput where the folder holds no clusters, Corrupt where its files do not fit each other."""
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    try:
        lines = [orjson.loads(line) for line in (folder / "clusters.jsonl").read_bytes().splitlines()]
        terms = {line["cluster"]: line["terms"] for line in lines}
        clusters = Clusters(
            labels=np.load(folder / "labels.npy", allow_pickle=False),
            centroids=np.load(folder / "centroids.npy", allow_pickle=False),
            terms=[terms[number] for number in range(len(lines))],
        )
        if len(clusters.centroids) != len(lines) or len(clusters.labels) != manifest["figures"]["rows"]:
            raise ValueError("they do not fit each other")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise Corrupt(f"the clusters cannot be read ({error})", where=str(folder), hint="cluster again") from None
    return ClusterFolder(folder, clusters, manifest)


def embed_like(
    found: ClusterFolder, rows: Sequence[Row], *, device: str = "auto", progress: Progress = SILENT
) -> Floats:
    """float32 [m, d]: other rows in the space of the centroids.

    An embedder that learns from the pool is restored as it was fitted there, from the cache. Raises NotFound where that
    is no longer there, BadInput where the embedder is another today.
    """
    options = FeatureOptions.from_mapping(found.manifest["config"], where=str(found.path / MANIFEST))
    embedder = open_embedder(options.embedder, base=options.base, device=device, seed=found.manifest["seed"])
    identity = found.manifest["figures"]["embedder"]
    if embedder.identity != identity:
        raise BadInput(
            f"its centroids are by {identity}, and {options.embedder} is {embedder.identity} here",
            where=str(found.path),
            hint="cluster the pool again",
        )
    if isinstance(embedder, FittedEmbedder):
        key = {"pool": found.manifest["inputs"]["pool"], "embedder": identity, "field": options.embed_field}
        state = ArrayCache(cache_folder() / "features", progress).find("embedder", key)
        if state is None:
            raise NotFound(
                f"what {options.embedder} learnt of the pool is not in the cache",
                where=str(found.path),
                hint="cluster that pool again into another folder, or by an embedder that comes trained (minilm)",
            )
        embedder.restore(state)
    return embedder.embed([FIELDS[options.embed_field](row.prompt, row.response) for row in rows], progress)


def describe_clusters(pool: Pool, embeddings: Floats, clusters: Clusters) -> list[dict[str, Any]]:
    """One mapping per cluster, biggest first."""
    cosines = _cosines(embeddings, clusters)
    sizes = clusters.sizes
    ids = pool.ids()
    lines = []
    for number in np.argsort(-sizes, kind="stable").tolist():
        members = np.flatnonzero(clusters.labels == number)
        central = members[np.argsort(-cosines[members], kind="stable")[:_CENTRAL_ROWS]]
        lines.append(
            {
                "cluster": number,
                "size": int(sizes[number]),
                "share": round(float(sizes[number] / len(clusters.labels)), 6),
                "terms": clusters.terms[number],
                "cosine": round(float(cosines[members].mean()), 6),
                "central": [ids[int(row)] for row in central],
                "central_rows": central.tolist(),
            }
        )
    return lines


def _cosines(embeddings: Floats, clusters: Clusters) -> Floats:
    """[n]: each row's cosine to the centroid of its own cluster."""
    return np.concatenate(
        [
            np.einsum("ij,ij->i", embeddings[at : at + 65_536], clusters.centroids[clusters.labels[at : at + 65_536]])
            for at in range(0, len(embeddings), 65_536)
        ]
    )


def _cohesion(embeddings: Floats, clusters: Clusters) -> float:
    return float(_cosines(embeddings, clusters).mean())


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _holds_clusters(out: Path) -> bool:
    path = out / MANIFEST
    if not path.is_file():
        return False
    manifest = read_json(path)
    return isinstance(manifest, dict) and manifest.get("kind") == KIND
