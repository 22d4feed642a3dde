"""k-means beside scikit-learn's MiniBatchKMeans and faiss: CPU seconds and the sum of squared errors.

    OMP_NUM_THREADS=1 python benchmarks/kmeans.py [--rows 100000] [--clusters 1024] [--repeats 3]

Rows are made up: unit vectors of 384 dimensions around 3,000 centres of unequal shares, around 300, and without any.
MiniBatchKMeans has batches of 1,024; faiss runs 20 iterations of its spherical k-means. All errors are of the rows to
the nearest centroid, brought to length 1. One thread; CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from xpert.clustering import cluster
from xpert.embedding import normalise
from xpert.similarity import max_similarity

D = 384


def rows(count: int, centres: int, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    noise = random.standard_normal((count, D), dtype=np.float32)
    if not centres:
        return normalise(noise)
    shares = random.dirichlet(np.full(centres, 0.5))
    means = normalise(random.normal(size=(centres, D)))
    return normalise(means[random.choice(centres, count, p=shares)] + 0.7 * noise / np.sqrt(D))


def by_sklearn(data: Any, k: int, seed: int) -> Any:
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(k, batch_size=1024, n_init=1, random_state=seed).fit(data).cluster_centers_


def by_faiss(data: Any, k: int, seed: int) -> Any:
    import faiss

    trainer = faiss.Kmeans(D, k, niter=20, seed=seed + 1, spherical=True, min_points_per_centroid=1)
    trainer.train(data)
    return trainer.centroids


def by_xpert(data: Any, k: int, seed: int) -> Any:
    return cluster(data, k, seed=seed)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    methods: dict[str, Callable[[Any, int, int], Any]] = {
        "xpert": by_xpert,
        "MiniBatchKMeans": by_sklearn,
        "faiss": by_faiss,
    }
    print(f"{given.rows:,} rows, {given.clusters:,} clusters\n")
    print("| rows around | by | CPU s | squared error | times xpert's seconds |\n|---|---|---|---|---|")
    for centres in (3000, 300, 0):
        data = rows(given.rows, centres)
        times: dict[str, list[float]] = {name: [] for name in methods}
        errors: dict[str, list[float]] = {name: [] for name in methods}
        for seed in range(given.repeats):
            for name, method in methods.items():
                started = time.process_time()
                centroids = method(data, given.clusters, seed)
                times[name].append(time.process_time() - started)
                cosines = max_similarity(data, normalise(centroids))[0].astype(np.float64)
                errors[name].append(float((2 - 2 * cosines).sum()))
        for name in methods:
            seconds = statistics.median(times[name])
            ratio = seconds / statistics.median(times["xpert"])
            what = f"{centres:,} centres" if centres else "none"
            print(
                f"| {what} | {name} | {seconds:.2f} | {statistics.median(errors[name]):,.0f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
