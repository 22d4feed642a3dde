"""Near repeats among embeddings beside semhash and a plain search: CPU seconds and recall.

    OMP_NUM_THREADS=1 python benchmarks/near_rows.py [--rows 100000] [--peer-python PYTHON] [--pool POOL]

Rows are made up: unit vectors of 384 dimensions around 3,000 centres and without any; a fifth are moved beside another
row. With --pool, the lsa embeddings of a pool as well. The plain search compares every row with all earlier ones
that stay; recall is the share of its repeats that are found. semhash gets the same vectors and its defaults; its own
embedding is not counted. It is run by PYTHON, which has `semhash` installed. One thread; CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

D = 384

SEMHASH = """
import sys, time, numpy as np
from semhash import SemHash
vectors = np.load(sys.argv[1]); threshold = float(sys.argv[2])
class Given:
    def encode(self, *_, **__):
        raise RuntimeError("nothing is to be embedded")
records = [str(row) for row in range(len(vectors))]
started = time.process_time()
found = SemHash.from_embeddings(vectors, records, Given()).self_deduplicate(threshold=threshold)
print(time.process_time() - started, len(records) - len(found.selected))
"""


def made_up(count: int, centres: int, seed: int = 0) -> Any:
    from xpert.embedding import normalise

    random = np.random.default_rng(seed)
    found = random.standard_normal((count, D), dtype=np.float32) / np.float32(np.sqrt(D))
    if centres:
        found = normalise(random.normal(size=(centres, D)))[random.integers(centres, size=count)] + 0.7 * found
    found = normalise(found)
    source, target = random.permutation(count)[: count // 5], random.permutation(count)[: count // 5]
    away = normalise(random.normal(size=(len(source), D))) * random.uniform(0.1, 0.4, size=(len(source), 1))
    found[target] = normalise(found[source] + away.astype(np.float32))
    return found


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        found = run()
        times.append(time.process_time() - started)
    return statistics.median(times), found


def by_semhash(python: str, vectors: Any, threshold: float) -> tuple[float, int] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, vectors)
        ran = subprocess.run([python, "-c", SEMHASH, path, str(threshold)], capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"semhash is left out: {reason} (pip install semhash; see --peer-python)", file=sys.stderr)
        return None
    seconds, dropped = ran.stdout.split()
    return float(seconds), int(dropped)


def sets(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    yield "around 3,000 centres", made_up(given.rows, 3000)
    yield "without centres", made_up(given.rows, 0)
    if given.pool:
        from xpert.data import open_pool
        from xpert.features import Features

        yield "a pool's, by lsa", np.array(Features(open_pool(given.pool)).embeddings())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--pool")
    given = parser.parse_args()
    from xpert import near_rows

    print(f"cosine {given.threshold}\n")
    print("| rows | by | CPU s | repeats found | recall | times xpert's seconds |\n|---|---|---|---|---|---|")
    for name, vectors in sets(given):
        seconds, stay = timed(lambda v=vectors: near_rows.first_of_near(v, given.threshold), given.repeats)
        plain, expected = timed(
            lambda v=vectors: near_rows._walk(v, given.threshold, near_rows._Everywhere(v)),
            1,
        )
        label = f"{len(vectors):,} {name}"
        recall = 1 - int((stay & ~expected).sum()) / max(1, int((~expected).sum()))
        print(f"| {label} | xpert | {seconds:.2f} | {int((~stay).sum()):,} | {recall:.5f} | 1 |", flush=True)
        print(
            f"| {label} | every pair | {plain:.2f} | {int((~expected).sum()):,} | 1 | {plain / seconds:.1f} |",
            flush=True,
        )
        peer = by_semhash(given.peer_python, vectors, given.threshold)
        if peer:
            print(f"| {label} | semhash | {peer[0]:.2f} | {peer[1]:,} | – | {peer[0] / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
