"""Farthest-first traversal beside a numpy loop and one that uses sklearn's distances: CPU seconds on one thread.

    python benchmarks/kcenter.py [--rows 100000] [--budget 1000] [--dimensions 384] [--data clustered isotropic]
        [--repeats 3]

All start at row 0. Each repeat runs all of them in turn. Peers: numpy (one product of the matrix with the row just
taken, and a running minimum) and scikit-learn's `euclidean_distances`, as k-center is usually written (for
active learning, say); sklearn's is timed over the first tenth of the rows taken, every one of which costs the same.
OMP_NUM_THREADS=1 should be set. `clustered`: 300 clusters of uneven size; `isotropic`: no row is near another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.selectors._spreading import spread


def data(kind: str, rows: int, dimensions: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((rows, dimensions), dtype=np.float32)
    if kind == "clustered":
        middles = rng.standard_normal((300, dimensions), dtype=np.float32)
        drawn = middles[rng.choice(300, rows, p=rng.dirichlet(np.full(300, 0.5)))] + np.float32(0.7) * drawn
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def by_xpert(rows: Any, budget: int) -> list[int]:
    return spread(rows, np.ones(len(rows), dtype=np.float32), 1.0, 0, BudgetMeter(budget))[0]


def by_numpy(rows: Any, budget: int) -> list[int]:
    taken = [0]
    distance = np.full(len(rows), np.inf, dtype=np.float32)
    while len(taken) < budget:
        np.minimum(distance, 1 - np.round(rows @ rows[taken[-1]], 6), out=distance)
        distance[taken[-1]] = -np.inf
        taken.append(int(distance.argmax()))
    return taken


def by_sklearn(rows: Any, budget: int) -> list[int]:
    from sklearn.metrics.pairwise import euclidean_distances

    taken = [0]
    distance = np.full(len(rows), np.inf, dtype=np.float32)
    while len(taken) < budget:
        np.minimum(distance, euclidean_distances(rows, rows[taken[-1:]])[:, 0], out=distance)
        distance[taken[-1]] = -np.inf
        taken.append(int(distance.argmax()))
    return taken


def spent(method: Callable[[Any, int], list[int]], rows: Any, budget: int) -> tuple[float, list[int]]:
    started = time.process_time()
    taken = method(rows, budget)
    return time.process_time() - started, taken


def radius(rows: Any, taken: list[int]) -> float:
    """The greatest distance 1 - cos of any row to the nearest taken one."""
    vectors = rows[taken].T
    return float(max(1 - (rows[at : at + 4096] @ vectors).max(axis=1).min() for at in range(0, len(rows), 4096)))


def parting(rows: Any, one: list[int], two: list[int]) -> str:
    """Where two sequences part, and by how much the two rows' distances differ in float64."""
    for place, (mine, other) in enumerate(zip(one, two, strict=True)):
        if mine != other:
            before = rows[one[:place]].astype(np.float64)
            near = [float((before @ rows[row].astype(np.float64)).max()) for row in (mine, other)]
            return f"parts at {place:,}, where the distances of the two rows differ by {abs(near[0] - near[1]):.0e}"
    return "the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--budget", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--data", nargs="+", default=["clustered", "isotropic"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    by_sklearn(np.eye(4, dtype=np.float32), 2)  # importing it is no part of its time
    print("| data | method | CPU s | times xpert's | sequence | radius |\n|---|---|---|---|---|---|")
    for kind in given.data:
        rows = data(kind, given.rows, given.dimensions)
        seconds: dict[str, list[float]] = {"xpert": [], "numpy loop": [], "sklearn distances": []}
        taken: dict[str, list[int]] = {}
        tenth = max(2, given.budget // 10)
        for _ in range(given.repeats):
            for name, method in (("xpert", by_xpert), ("numpy loop", by_numpy)):
                one, taken[name] = spent(method, rows, given.budget)
                seconds[name].append(one)
            one, taken["sklearn distances"] = spent(by_sklearn, rows, tenth)
            seconds["sklearn distances"].append(one * (given.budget - 1) / (tenth - 1))
        own = statistics.median(seconds["xpert"])
        for name, all_seconds in seconds.items():
            median = statistics.median(all_seconds)
            told = ["", ""]
            if name == "xpert":
                told = ["", f"{radius(rows, taken[name]):.6f}"]
            elif name == "numpy loop":
                told = [parting(rows, taken["xpert"], taken[name]), f"{radius(rows, taken[name]):.6f}"]
            else:
                told = [f"of the first {tenth:,}: {parting(rows, taken['xpert'][:tenth], taken[name])}", ""]
            print(f"| {kind} | {name} | {median:.2f} | {median / own:.1f} | {told[0]} | {told[1]} |", flush=True)


if __name__ == "__main__":
    main()
