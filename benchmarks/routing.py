"""How often a prompt reaches the expert of its skill, and how often a prompt that none fits stays with the base.

    python benchmarks/routing.py --pool POOL --shots SHOTS --prompts PROMPTS [--experts 10] [--draws 3] [-p KEY=VALUE]

POOL, SHOTS and PROMPTS are sources whose rows have a `skill`. Each of `--experts` skills, drawn by seed, is an expert
whose exemplars are its shots and rows that `kshot` selected for them, as training leaves them. Prompts of these skills
should be routed to their expert; those of all other skills should be left to the base. No model is loaded.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np

from xpert import plugins
from xpert.data import open_pool, overlapping_rows, read_prompts, read_shots
from xpert.features import FeatureOptions, Features
from xpert.protocols import RoutableExpert, RouteRequest
from xpert.records import Budget, Row, Shots
from xpert.selection import choose

EXEMPLARS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--pool", "--shots", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("-p", "--param", action="append", default=[], help="a parameter of router centroid")
    given = parser.parse_args()
    router_class = plugins.load("router", "centroid")
    options = router_class.Options.from_mapping(dict(pair.split("=", 1) for pair in given.param))
    experts = _experts(given.pool, given.shots)
    prompts = [row for row in read_prompts(given.prompts) if row.skill in experts]
    requests = [RouteRequest(row.id, row.messages, row.skill) for row in prompts]
    print("| draw | right expert ranked first | routed right | foreign prompts left to the base | ms a prompt |")
    print("|---|---|---|---|---|")
    figures: list[tuple[float, float, float, float]] = []
    for draw in range(given.draws):
        names = np.random.default_rng(draw).choice(sorted(experts), given.experts, replace=False).tolist()
        router = router_class(options)
        router.prepare([experts[name] for name in names])
        started = time.perf_counter()
        routes = router.route(requests)
        spent = (time.perf_counter() - started) / len(requests) * 1000
        own = [(r, q.skill) for r, q in zip(routes, requests, strict=True) if q.skill in names]
        first = np.mean([r.candidates[0].expert == skill for r, skill in own])
        right = np.mean([bool(r.experts) and r.experts[0][0] == skill for r, skill in own])
        foreign = np.mean([not r.experts for r, q in zip(routes, requests, strict=True) if q.skill not in names])
        figures.append((float(first), float(right), float(foreign), spent))
        print(f"| {draw + 1} | {first:.3f} | {right:.3f} | {foreign:.3f} | {spent:.2f} |", flush=True)
    first, right, foreign, spent = np.mean(figures, axis=0)
    print(f"| mean | {first:.3f} | {right:.3f} | {foreign:.3f} | {spent:.2f} |")


def _experts(pool_source: str, shots_source: str) -> dict[str, RoutableExpert]:
    pool = open_pool(pool_source)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in read_shots(shots_source):
        groups[str(row.skill)].append(row)
    selector = plugins.load("selector", "kshot")
    found = {}
    for skill, rows in groups.items():
        shots = Shots(tuple(rows))
        excluded, _ = overlapping_rows(pool, shots)
        features = Features(pool, FeatureOptions(), shots=shots)
        budget = Budget(EXEMPLARS - len(rows), "rows")
        chosen = choose(selector(selector.Options()), features, shots, budget, excluded=excluded)
        prompts = [row.prompt for row in (*rows, *pool.rows(chosen.rows))]
        found[skill] = RoutableExpert(skill, tuple(prompts), (skill,))
    return found


if __name__ == "__main__":
    main()
