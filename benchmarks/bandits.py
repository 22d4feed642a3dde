"""How much of full scoring's utility the bandits keep when they may score 5, 10 or 20 % of a pool.

    python benchmarks/bandits.py [--pool POOL --shots SHOTS] [--reward similarity] [--base MODEL] [--sample ROWS]

Made-up pools whose clusters tell the rewards apart well, less well, hardly and not at all; and, with POOL and SHOTS,
real rows whose reward is a scorer's: for `similarity` the shots of one skill at a time, else of all skills together.
Kept: of the greatest mean reward that as many rows can have, and, in brackets, of what it is above the pool's mean;
means over seeds and skills. `rows at random` scores that share of the rows at random and takes the best of them.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any
from unittest.mock import patch

import numpy as np

from xpert import plugins
from xpert.clustering import Clusters
from xpert.data import open_pool, pool_from_rows, read_shots
from xpert.features import FeatureOptions, Features
from xpert.progress import StreamProgress
from xpert.records import Budget, Message, Row, Shots
from xpert.selection import choose
from xpert.selectors._bandits import NAMES
from xpert.selectors._scoring import prepared_scorer

SHARES = (0.05, 0.10, 0.20)
# name -> (standard deviation of the clusters' mean rewards, of rewards inside a cluster)
MADE_UP = {"apart": (1.0, 0.5), "half": (1.0, 1.0), "hardly": (0.3, 0.95), "no clusters": (0.0, 1.0)}
CONTROL = "rows at random"


@dataclass
class Case:
    """A pool with clusters, and what every row is worth: all rows are scored once, to know what could be had."""

    features: Any
    rewards: Any
    data: str
    seeds: Sequence[int]

    def score(self, rows: Any) -> Any:
        return self.rewards[rows]

    def explain(self, row: int) -> str:
        return f"{self.rewards[row]:.3f}"


class MadeUp:
    """Features of a pool of rows without a text: its clusters are all there is."""

    def __init__(self, labels: Any, centroids: Any) -> None:
        self.pool = pool_from_rows([Row(f"r{i}", (Message("user", f"row {i}"),), "a") for i in range(len(labels))])
        self._clusters = Clusters(labels.astype(np.int32), centroids, [[] for _ in centroids])

    def clusters(self) -> Clusters:
        return self._clusters


def main() -> None:
    given = _arguments()
    spent: dict[str, list[float]] = defaultdict(list)
    for data, cases in groupby(chain(_made_up(given.rows, given.seeds), _real(given)), lambda case: case.data):
        kept: dict[str, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for case in cases:
            for seed in case.seeds:
                for share in SHARES:
                    _run(case, share, seed, given.budget, kept, spent)
        _print(data, kept)
    slowest = max(spent, key=lambda name: float(np.median(spent[name])))
    middle = np.median(np.concatenate(list(spent.values())))
    most = np.median(spent[slowest])
    print(f"\nCPU s of a selection besides scoring: median {middle:.2f}; {most:.2f} with {slowest}.")


def _run(case: Case, share: float, seed: int, budget: str, kept: Any, spent: Any) -> None:
    rewards = case.rewards.astype(np.float64)
    count = Budget.parse(budget).limit(len(rewards))
    best, mean = np.sort(rewards)[::-1][:count].mean(), rewards.mean()

    def note(name: str, rows: Any) -> None:
        value = rewards[rows].mean()
        kept[name][share].append((value / best, (value - mean) / (best - mean)))

    drawn = np.random.default_rng(seed).choice(len(rewards), round(share * len(rewards)), replace=False)
    note(CONTROL, drawn[np.argsort(-rewards[drawn])][:count])
    for method in ("clusterucb", "quad"):
        plugin = plugins.load("selector", method)
        for policy in NAMES:
            options = plugin.Options(reward="length", policy=policy, evaluate=f"{share * 100:g}%")
            with patch(f"xpert.selectors.{method}.prepared_scorer", lambda *_: case):
                started = time.process_time()
                found = choose(plugin(options), case.features, None, Budget.parse(budget), seed=seed)
            spent[f"{method} {policy}"].append(time.process_time() - started)
            assert found.log[-1]["scored"] == Budget.parse(f"{share * 100:g}%").limit(len(rewards))
            note(f"{method} {policy}", found.rows)


def _made_up(rows: int, seeds: int) -> Iterator[Case]:
    """A pool for each kind and seed: as many clusters of unlike sizes as `auto` would make, in 16 dimensions."""
    if not rows:
        return
    many = round((rows / 2) ** 0.5)
    for name, (between, within) in MADE_UP.items():
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            labels = rng.choice(many, size=rows, p=rng.dirichlet(np.full(many, 2.0)))
            centroids = rng.normal(size=(many, 16))
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
            rewards = between * rng.normal(size=many)[labels] + within * rng.normal(size=rows)
            yield Case(MadeUp(labels, centroids.astype(np.float32)), rewards.astype(np.float32), name, [seed])


def _real(given: argparse.Namespace) -> Iterator[Case]:
    if given.pool is None:
        return
    pool = open_pool(given.pool, progress=StreamProgress())
    if given.sample:
        rng = np.random.default_rng(0)
        pool = pool_from_rows(pool.rows(np.sort(rng.choice(len(pool), given.sample, replace=False)).tolist()))
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in read_shots(given.shots):
        groups[str(row.skill) if given.reward == "similarity" else "all skills"].append(row)
    chosen = sorted(groups)[:: max(1, len(groups) // given.skills)][: given.skills]
    for skill in chosen:
        shots = Shots(tuple(groups[skill]))
        features = Features(pool, FeatureOptions(), shots=shots, progress=StreamProgress())
        options = FeatureOptions(embedder=given.embedder, base=given.base, max_length=given.max_length)
        scored = Features(pool, options, shots=shots, progress=StreamProgress())
        scorer = prepared_scorer(given.reward, given.reward_params, scored, shots, np.random.default_rng(0))
        scores = np.asarray(scorer.score(np.arange(len(pool), dtype=np.int64)))
        known = np.isfinite(scores)
        by = f" by {given.embedder}" if given.reward == "similarity" else ""
        data = f"{given.reward}{by} ({len(pool):,} rows)"
        yield Case(features, np.where(known, scores, scores[known].min()), data, range(given.seeds))


def _print(data: str, kept: Any) -> None:
    print(f"\n### {data}\n")
    print("| method and policy | 5 % scored | 10 % | 20 % |\n|---|---|---|---|")
    for method, values in kept.items():
        pairs = [np.mean(values[share], axis=0) for share in SHARES]
        print(f"| {method} | {' | '.join(f'{whole:.3f} ({above:.3f})' for whole, above in pairs)} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool")
    parser.add_argument("--shots")
    parser.add_argument("--reward", default="similarity")
    parser.add_argument("--reward-params", default="")
    parser.add_argument("--embedder", default="lsa", help="of the reward; rows are clustered by lsa in any case")
    parser.add_argument("--base")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--sample", type=int, help="rows of POOL, drawn at random; default: all")
    parser.add_argument("--skills", type=int, default=4)
    parser.add_argument("--rows", type=int, default=20_000, help="of a made-up pool; 0: none of these")
    parser.add_argument("--budget", default="2%")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
