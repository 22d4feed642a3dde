"""IDEAL beside a greedy that simulates every candidate anew: how fast, and at what influence?

    python benchmarks/ideal.py [--rows 5000] [--wanted 100] [--samples 100] [--small-rows 500]
                               [--small-wanted 20] [--repeats 3]

Rows are made up: unit vectors of 384 dimensions around 200 centres, ten neighbours each. The plain form simulates ten
cascades for every candidate at every pick, as the released code does, but with sets for its lists and each row counted
once. It runs in full on a small task, where influence is compared by 2,000 cascades drawn anew. On the large one it
would take most of an hour: there 100 of its candidates are timed beside the first 0, 25, 50, 75 and 99 % of the rows
that xpert took, and all picks are reckoned from those. It runs once, xpert `--repeats` times. CPU seconds on one
thread; the neighbour graph is timed for xpert and given to the plain form.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.selectors.ideal import Cascades, edge_chances
from xpert.similarity import nearest

NEIGHBOURS = 10
SIMULATIONS = 10
CANDIDATES = 100
JUDGED_BY = 2000


def rows(count: int, *, d: int = 384, centres: int = 200, seed: int = 0) -> Any:
    drawn = np.random.default_rng(seed)
    found = drawn.normal(size=(centres, d))[drawn.integers(centres, size=count)] + drawn.normal(size=(count, d))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


Graph = list[list[tuple[int, float]]]


def graph(embeddings: Any) -> Graph:
    cosines, neighbours = nearest(embeddings, embeddings, NEIGHBOURS, skip_self=True)
    lines = zip(neighbours.tolist(), edge_chances(cosines).tolist(), strict=True)
    return [list(zip(others, chances, strict=True)) for others, chances in lines]


def influence(edges: Graph, seeds: list[int], simulations: int) -> float:
    """The mean number of rows that independent cascades reach."""
    count = 0
    for _ in range(simulations):
        active, frontier = set(seeds), seeds
        while frontier:
            new = []
            for row in frontier:
                for other, chance in edges[row]:
                    if other not in active and random.random() < chance:
                        active.add(other)
                        new.append(other)
            frontier = new
        count += len(active)
    return count / simulations


def plain(edges: Graph, wanted: int) -> list[int]:
    taken = [0]  # all have as many edges going out, so the published start is the first row
    while len(taken) < wanted:
        candidates = (row for row in range(len(edges)) if row not in taken)
        taken.append(max(candidates, key=lambda row: influence(edges, [*taken, row], SIMULATIONS)))
    return taken


def reckoned(edges: Graph, taken: list[int]) -> float:
    """The seconds that `plain` would take for as many rows, from a sample of what it does."""
    paces = []
    candidates = random.sample(range(len(edges)), min(len(edges), CANDIDATES + len(taken)))
    some = [row for row in candidates if row not in taken][:CANDIDATES]
    for share in (0, 0.25, 0.5, 0.75, 0.99):
        seeds = taken[: max(1, int(share * len(taken)))]
        _, spent = seconds(lambda seeds=seeds: [influence(edges, [*seeds, row], SIMULATIONS) for row in some])
        paces.append(spent / len(some))
    return float(np.mean(paces)) * len(edges) * (len(taken) - 1)


def ours(embeddings: Any, wanted: int, samples: int) -> list[int]:
    cosines, neighbours = nearest(embeddings, embeddings, NEIGHBOURS, skip_self=True)
    cascades = Cascades(neighbours, edge_chances(cosines), samples, np.random.default_rng(0))
    return cascades.take(BudgetMeter(wanted))[0]


def seconds(run: Any, repeats: int = 1) -> tuple[Any, float]:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        found = run()
        times.append(time.process_time() - started)
    return found, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rows": 5000, "wanted": 100, "samples": 100, "small-rows": 500, "small-wanted": 20}
    for name, default in {**sizes, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    random.seed(0)
    print("| task | program | CPU s | times as fast | influence |\n|---|---|---|---|---|")

    embeddings = rows(given.small_rows, centres=max(5, given.small_rows // 25))
    edges = graph(embeddings)
    task = f"{given.small_wanted} of {given.small_rows:,}"
    fast, spent = seconds(lambda: ours(embeddings, given.small_wanted, given.samples), given.repeats)
    slow, whole = seconds(lambda: plain(edges, given.small_wanted))
    print(f"| {task} | simulating anew | {whole:.2f} | 1 | {influence(edges, slow, JUDGED_BY):.1f} |")
    print(
        f"| {task} | xpert | {spent:.2f} | {whole / spent:.0f} | {influence(edges, fast, JUDGED_BY):.1f} |", flush=True
    )

    embeddings = rows(given.rows)
    edges = graph(embeddings)
    task = f"{given.wanted} of {given.rows:,}"
    few, spent = seconds(lambda: ours(embeddings, given.wanted, 10), given.repeats)
    print(f"| {task} | xpert, 10 samples | {spent:.2f} | | {influence(edges, few, JUDGED_BY):.1f} |", flush=True)
    fast, spent = seconds(lambda: ours(embeddings, given.wanted, given.samples), given.repeats)
    reached = influence(edges, fast, JUDGED_BY)
    whole = reckoned(edges, fast)
    print(f"| {task} | simulating anew, reckoned | {whole:.0f} | 1 | not run |")
    print(f"| {task} | xpert, {given.samples} samples | {spent:.2f} | {whole / spent:.0f} | {reached:.1f} |")


if __name__ == "__main__":
    main()
