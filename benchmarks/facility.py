"""Facility location beside apricot, on data with and without clusters: CPU seconds on one thread, and what is covered.

    python benchmarks/facility.py [--rows 20000] [--budget 1000] [--dimensions 384] [--data clustered isotropic ...]
        [--repeats 3] [--peers PYTHON] [--large 300000]

The peer needs `pip install apricot-select` (numba, scikit-learn); PYTHON is the interpreter that has it, this one by
default. It gets all similarities ready, as a dense matrix: what it takes to compute them stands apart. `--large` runs
the default alone on so many clustered rows and tells the greatest memory. OMP_NUM_THREADS=1 should be set.

Data, unit rows: `clustered`, 300 clusters of uneven size; `falling`, coordinates whose spread falls as 1 / i^0.6, so
that there are no clusters but neighbourhoods; `isotropic`, normal coordinates, so that no row is near another.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xpert.records import Budget
from xpert.selectors.facility import PLUGIN, FacilityOptions

PEER = """
import json, sys, time
try:
    import numpy as np
    from apricot import FacilityLocationSelection
except ImportError as error:
    sys.exit(f"missing: {error.name}")
FacilityLocationSelection(3, metric="precomputed", optimizer="lazy").fit(np.eye(9))  # numba compiles
rows, budget = np.load(sys.argv[1]), int(sys.argv[2])
started = time.process_time()
similar = np.maximum(rows @ rows.T, 0).astype(np.float64)
ready = time.process_time()
found = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy").fit(similar)
spent = time.process_time() - ready
print(json.dumps({"matrix": ready - started, "fit": spent, "rows": found.ranking.tolist()}))
"""


class Vectors:
    """The features of a pool that is embedded already."""

    def __init__(self, embeddings: Any) -> None:
        self._embeddings = embeddings

    def embeddings(self) -> Any:
        return self._embeddings


def data(kind: str, rows: int, dimensions: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((rows, dimensions), dtype=np.float32)
    if kind == "clustered":
        middles = rng.standard_normal((300, dimensions), dtype=np.float32)
        drawn = middles[rng.choice(300, rows, p=rng.dirichlet(np.full(300, 0.5)))] + np.float32(0.7) * drawn
    elif kind == "falling":
        drawn *= np.arange(1, dimensions + 1, dtype=np.float32) ** np.float32(-0.6)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def covered(rows: Any, chosen: Any) -> float:
    best = (rows[start : start + 2000] @ rows[chosen].T for start in range(0, len(rows), 2000))
    return sum(float(np.maximum(part, 0).max(axis=1).sum(dtype=np.float64)) for part in best)


def xpert(rows: Any, budget: int, **options: Any) -> tuple[float, Any, list[dict[str, Any]]]:
    """CPU seconds, rows chosen, log."""
    selector = PLUGIN(FacilityOptions(**options))
    features: Any = Vectors(rows)
    started = time.process_time()
    found = selector.select(features, None, Budget(budget, "rows"), np.random.default_rng(0))
    return time.process_time() - started, found.rows, [dict(step) for step in found.log]


def apricot(python: str, rows: Any, budget: int) -> dict[str, Any] | str:
    """Its figures, or why there are none."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        run = subprocess.run(
            [python, "-c", PEER, str(file), str(budget)], env=environment, capture_output=True, text=True
        )
    if run.returncode and run.stderr.strip().startswith("missing: "):
        return f"not run, {run.stderr.strip()}: pip install apricot-select"
    run.check_returncode()
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    given = _arguments()
    print("| data | method | CPU s | apricot's fit / this | its matrix and fit / this | covered, exact = 1 |")
    print("|---|---|---|---|---|---|")
    for kind in given.data:
        rows = data(kind, given.rows, given.dimensions)
        peer = apricot(given.peers, rows, given.budget)
        spent: dict[str, list[float]] = {"exact": [], "cells": [], "blocks": []}
        chosen: dict[str, Any] = {"random draw": np.random.default_rng(1).permutation(len(rows))[: given.budget]}
        log: list[dict[str, Any]] = []
        for repeat in range(given.repeats):
            for mode in spent:
                if repeat and mode == "exact" and given.repeats < 5:
                    continue  # many seconds, and the same work each time
                seconds, chosen[mode], said = xpert(rows, given.budget, mode=mode)
                spent[mode].append(seconds)
                log = said if mode == "cells" else log
        exact = covered(rows, chosen["exact"])
        if isinstance(peer, str):
            print(f"| {kind} | apricot, lazy | {peer} | | | |")
        else:
            share = covered(rows, peer["rows"]) / exact
            print(f"| {kind} | apricot, lazy, matrix {peer['matrix']:.1f} s | {peer['fit']:.2f} | 1 | | {share:.4f} |")
        for mode, seconds_each in spent.items():
            seconds = statistics.median(seconds_each)
            ratios = "| |"
            if not isinstance(peer, str):
                ratios = f"{peer['fit'] / seconds:.1f} | {(peer['matrix'] + peer['fit']) / seconds:.1f} |"
            name = mode if mode != "cells" else f"cells (default): {_searched(log)}"
            print(f"| {kind} | {name} | {seconds:.2f} | {ratios} {covered(rows, chosen[mode]) / exact:.4f} |")
        print(f"| {kind} | random draw | | | | {covered(rows, chosen['random draw']) / exact:.4f} |", flush=True)
    if given.large:
        seconds, chosen_rows, log = xpert(data("clustered", given.large, given.dimensions), given.budget)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"\n{len(chosen_rows):,} of {given.large:,} clustered rows by the default ({_searched(log)}): ", end="")
        print(f"{seconds:.1f} CPU s, at most {most:.1f} GB in the process's life, data included")


def _searched(log: list[dict[str, Any]]) -> str:
    cells = [step for step in log if step["step"] == "cells"]
    return f"{cells[0]['searched']} of {cells[0]['count']} cells searched" if cells else "exact, a small pool"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--budget", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--data", nargs="*", default=["clustered", "falling", "isotropic"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--large", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
