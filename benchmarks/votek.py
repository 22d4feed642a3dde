"""Vote-k beside the algorithm as it was published: the same picks in the same order?

    python benchmarks/votek.py [--rows 10000] [--wanted 100] [--neighbours 150] [--repeats 3]

Rows are made up: unit vectors of 384 dimensions around 200 centres. The plain form is the released `fast_votek`, step
by step: a cosine of every row with all others, one row at a time, an argsort of each, and every score counted anew for
each pick, with lists. It runs once, xpert `--repeats` times; both build the neighbour graph. CPU seconds on one
thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.selectors.votek import Votes
from xpert.similarity import nearest


def rows(count: int, *, d: int = 384, centres: int = 200, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    found = random.normal(size=(centres, d))[random.integers(centres, size=count)] + random.normal(size=(count, d))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def published(embeddings: Any, wanted: int, k: int) -> list[int]:
    from sklearn.metrics.pairwise import cosine_similarity

    voters: dict[int, list[int]] = defaultdict(list)
    for row in range(len(embeddings)):
        cosines = np.sum(cosine_similarity(embeddings, embeddings[row].reshape(1, -1)), axis=1)
        for other in np.argsort(cosines).tolist()[-k - 1 : -1]:
            if other != row:
                voters[other].append(row)
    by_votes = sorted(voters.items(), key=lambda item: len(item[1]), reverse=True)
    taken: list[int] = []
    times: dict[int, int] = defaultdict(int)
    while len(taken) < wanted:
        scores: dict[int, float] = defaultdict(int)
        for row, votes in by_votes:
            if row in taken:
                scores[row] = -100
                continue
            for voter in votes:
                if voter not in taken:
                    scores[row] += 10 ** (-times[voter])
        best = max(scores.items(), key=lambda item: item[1])[0]
        taken.append(best)
        for voter in voters[best]:
            times[voter] += 1
    return taken


def ours(embeddings: Any, wanted: int, k: int) -> list[int]:
    votes = Votes(nearest(embeddings, embeddings, k, skip_self=True)[1])
    votes.take(BudgetMeter(wanted))
    return votes.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 10_000), ("wanted", 100), ("neighbours", 150), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    embeddings = rows(given.rows)
    picks, spent = {}, {}
    for name, choose, repeats in (("published algorithm", published, 1), ("xpert", ours, given.repeats)):
        times = []
        for _ in range(repeats):
            started = time.process_time()
            picks[name] = choose(embeddings, given.wanted, given.neighbours)
            times.append(time.process_time() - started)
        spent[name] = statistics.median(times)
    print(f"{given.wanted} of {given.rows:,} rows, {given.neighbours} neighbours\n")
    print("| program | CPU s | times as fast | same picks in the same order |\n|---|---|---|---|")
    plain, fast = picks["published algorithm"], picks["xpert"]
    same = next((n for n, (a, b) in enumerate(zip(plain, fast, strict=True)) if a != b), len(plain))
    print(f"| published algorithm | {spent['published algorithm']:.2f} | 1 | |")
    ratio = spent["published algorithm"] / spent["xpert"]
    verdict = "yes" if same == len(plain) else f"the first {same}; {len(set(plain) & set(fast))} of them in all"
    print(f"| xpert | {spent['xpert']:.2f} | {ratio:.0f} | {verdict} |")


if __name__ == "__main__":
    main()
