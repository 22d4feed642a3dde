"""Greedy DPP beside Chen's recursion and pyversity: the same set, and how fast?

    python benchmarks/dpp.py [--rows 20000] [--wanted 1000] [--ridge 0.01] [--repeats 3]

Rows are made up: unit vectors of 384 dimensions, once around 200 centres and once without any, with a relevance drawn
for each that scales the kernel (so that no two rows tie). Chen's recursion is the published code's loop over a kernel
matrix in float64, measured without and with the making of that matrix (xpert makes none); it runs once. pyversity knows
the linear kernel alone, so from as many rows as there are dimensions on it has only rounding to go by: the sets are
compared on the first 300, with ridge=0 in xpert. CPU seconds on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.selectors.dpp import Volume

BETA = 0.1
MEANT = 300


def rows(count: int, *, centres: int, d: int = 384, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    found = random.normal(size=(count, d))
    if centres:
        found += random.normal(size=(centres, d))[random.integers(centres, size=count)]
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def kernel(embeddings: Any, z: Any, ridge: float) -> Any:
    scaled = embeddings.astype(np.float64) * np.exp(BETA * z)[:, None]
    found = scaled @ scaled.T
    found[np.diag_indices(len(found))] = np.exp(2 * BETA * z) * (1 + ridge)
    return found


def chen(matrix: Any, wanted: int) -> list[int]:
    """The published loop, https://github.com/laming-chen/fast-map-dpp."""
    factors = np.zeros((wanted, len(matrix)))
    left = np.copy(np.diag(matrix))
    taken = [int(np.argmax(left))]
    while len(taken) < wanted:
        last, count = taken[-1], len(taken) - 1
        root = np.sqrt(left[last])
        found = (matrix[last] - np.dot(factors[:count, last], factors[:count, :])) / root
        factors[count] = found
        left -= np.square(found)
        left[last] = -np.inf
        taken.append(int(np.argmax(left)))
    return taken


def pyversity(embeddings: Any, relevance: Any, wanted: int) -> list[int]:
    from pyversity.strategies.dpp import dpp

    np.seterr(over="ignore")  # past the rank of the kernel its float32 overflows
    found: list[int] = dpp(embeddings, relevance, wanted, diversity=1 - BETA).indices.tolist()
    return found


def ours(embeddings: Any, z: Any, wanted: int, ridge: float) -> list[int]:
    volume = Volume(embeddings, ridge, 2 * BETA * z)
    volume.take(BudgetMeter(wanted))
    return volume.rows


def timed(run: Callable[[], list[int]], repeats: int) -> tuple[list[int], float]:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        found = run()
        times.append(time.process_time() - started)
    return found, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 20_000), ("wanted", 1_000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ridge", type=float, default=0.01)
    given = parser.parse_args()
    print(f"{given.wanted:,} of {given.rows:,} rows, d = 384, ridge {given.ridge}\n")
    print(
        "| rows | program | CPU s | xpert is so many times as fast | rows in common with xpert |\n|---|---|---|---|---|"
    )
    for what, centres in (("200 centres", 200), ("no centres", 0)):
        _compare(what, rows(given.rows, centres=centres), given.wanted, given.ridge, given.repeats)


def _compare(what: str, embeddings: Any, wanted: int, ridge: float, repeats: int) -> None:
    relevance = np.random.default_rng(1).normal(size=len(embeddings))
    z = (relevance - relevance.mean()) / relevance.std()
    best, spent = timed(lambda: ours(embeddings, z, wanted, ridge), repeats)
    started = time.process_time()
    matrix = kernel(embeddings, z, ridge)
    making = time.process_time() - started
    plain, slow = timed(lambda: chen(matrix, wanted), 1)
    order = "in the same order" if plain == best else f"the first {_same(plain, best)} in the same order"
    common = f"{len(set(plain) & set(best)):,} of {len(plain):,}, {order}"
    print(f"| {what} | Chen's recursion on a ready kernel | {slow:.2f} | {slow / spent:.1f} | {common} |")
    whole = slow + making
    print(f"| {what} | its kernel matrix and the recursion | {whole:.2f} | {whole / spent:.1f} | |", flush=True)
    try:
        theirs, slow = timed(lambda: pyversity(embeddings, relevance, wanted), repeats)
        meant = min(MEANT, wanted)
        common = f"{len(set(theirs[:meant]) & set(ours(embeddings, z, meant, 0.0)))} of the first {meant}"
        print(f"| {what} | pyversity | {slow:.2f} | {slow / spent:.1f} | {common} |")
    except ImportError:
        print(f"| {what} | pyversity | not installed | | |")
    print(f"| {what} | xpert | {spent:.2f} | 1 | |", flush=True)


def _same(one: list[int], two: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    main()
