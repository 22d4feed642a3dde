"""What routers that learn from observations earn, and what a route costs.

    python benchmarks/learned_routers.py --prompts PROMPTS [--train 1000] [--experts 10 100 10000] [--repeats 3]

PROMPTS is a source whose rows have a `skill`. No model is loaded: the observations are drawn. An expert is right with
chance 0.9 on one skill (skills in turn) and 0.2 on others, the base with chance 0.5 on all. Routers learn from some
prompts and are measured on the others: the mean chance that the answer is right. Milliseconds are of single prompts,
the median of 200, the least of the repeats.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from xpert import plugins
from xpert.data import read_prompts
from xpert.protocols import Observations, RoutableExpert, RouteRequest

OWN, OTHER, BASE = 0.9, 0.2, 0.5
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("category", {}),
    ("category", {"classifier": "knn"}),
    ("tryage", {"predict": "score"}),
    ("tryage", {"predict": "score", "head": "mlp"}),
    ("mf", {}),
    ("cascade", {"mode": "before", "router": "tryage", "router_params": ("predict=score",)}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--experts", type=int, nargs="+", default=[10, 100, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rows = read_prompts(given.prompts)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    requests = [RouteRequest(rows[i].id, rows[i].messages, rows[i].skill) for i in order]
    train = requests[: min(given.train, len(requests) // 2)]
    test = requests[len(train) :]
    print(f"{len(train)} prompts to learn from, {len(test)} to measure on; base alone: {BASE}\n")
    print("| experts | router | mean chance to be right | to the base | seconds to learn | state, MB | ms a prompt |")
    print("|---|---|---|---|---|---|---|")
    for count in given.experts:
        experts, chances = _experts(requests, count)
        seen = _observed(experts, train, chances)
        for name, params in WAYS:
            _measure(name, params, experts, seen, test, chances, given.repeats)


def _experts(requests: list[RouteRequest], count: int) -> tuple[list[RoutableExpert], dict[str, np.ndarray]]:
    """The experts, and skill -> the chance of each to be right, the base last."""
    skills = sorted({str(request.skill) for request in requests})
    experts = [
        RoutableExpert(f"e{i:05}", (), (skills[i % len(skills)],), costs={"parameters": 1e6}) for i in range(count)
    ]
    own = np.arange(count) % len(skills)
    return experts, {skill: np.r_[np.where(own == i, OWN, OTHER), BASE] for i, skill in enumerate(skills)}


def _observed(experts: list[RoutableExpert], train: list[RouteRequest], chances: dict[str, np.ndarray]) -> Observations:
    rng = np.random.default_rng(1)
    scores = np.stack([rng.random(len(experts) + 1) < chances[str(request.skill)] for request in train]).astype(float)
    return Observations(tuple(train), (*(expert.key for expert in experts), "base"), scores, 2 - scores)


def _measure(
    name: str,
    params: dict[str, object],
    experts: list[RoutableExpert],
    seen: Observations,
    test: list[RouteRequest],
    chances: dict[str, np.ndarray],
    repeats: int,
) -> None:
    kind = plugins.load("router", name)
    router = kind(kind.Options.from_mapping(params))
    begun = time.perf_counter()
    state = router.learn(experts, seen)
    learned = time.perf_counter() - begun
    place = {expert.key: index for index, expert in enumerate(experts)}
    routes = router.route([RouteRequest(r.id, r.messages) for r in test])
    right = [
        chances[str(request.skill)][place[route.experts[0][0]] if route.experts else -1]
        for request, route in zip(test, routes, strict=True)
    ]
    spent = []
    for _ in range(repeats):
        times = []
        for request in test[:200]:
            begun = time.perf_counter()
            router.route([request])
            times.append(time.perf_counter() - begun)
        spent.append(np.median(times) * 1000)
    size = sum(tensor.nbytes for tensor in state.tensors.values()) / 1e6
    told = " ".join([name, *(f"{key}={value}" for key, value in params.items() if key != "router_params")])
    to_base = np.mean([not route.experts for route in routes])
    figures = f"{np.mean(right):.3f} | {to_base:.2f} | {learned:.1f} | {size:.1f} | {min(spent):.2f}"
    print(f"| {len(experts):,} | {told} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
