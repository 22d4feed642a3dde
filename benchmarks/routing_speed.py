"""Milliseconds that routing adds to a request, by router and number of experts.

    OMP_NUM_THREADS=1 python benchmarks/routing_speed.py [--experts 100,1000,10000] [--requests 200] [NAME ...]

Experts are made up: each has 8 exemplars of 16 words, half of them of its own 30 words and half of all 20,000, which
are as frequent as 1/rank; a description of 12 of its words, and votes on 40 keywords, of which 8 are its own words. A
prompt is made like an exemplar of one expert. Single requests are routed one by one, each a prompt of its own; batches
hold 16. CPU milliseconds of one thread, so that what else runs on the machine counts little; no language model. NAMEs
of routers, such as `centroid` or `centroid:mode=centroid`, choose rows of the table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.protocols import RoutableExpert, Router, RouteRequest
from xpert.records import Message

ROUTERS = ("random", "fixed:expert=x00000", "centroid", "centroid:mode=centroid", "skills", "glider")
BATCH = 16
WORDS, OWN, EXEMPLARS = 20_000, 30, 8
KEYWORDS, PROFILED = 500, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routers", nargs="*", default=ROUTERS, metavar="NAME")
    parser.add_argument("--experts", default="100,1000,10000")
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    print("| experts | router | prepare, s | alone, ms: median | p99 | in a batch of 16, ms a request: median | p99 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in map(int, given.experts.split(",")):
        experts, requests = _made_up(count, given.requests)
        for name in given.routers:
            started = time.process_time()
            router = _opened(name)
            router.prepare(experts)
            prepared = time.process_time() - started
            router.route(requests[:BATCH])  # what is only made at the first request
            single = _milliseconds(router, [requests[at : at + 1] for at in range(len(requests))])
            batch = _milliseconds(router, [requests[at : at + BATCH] for at in range(0, len(requests), BATCH)]) / BATCH
            figures = [*np.percentile(single, [50, 99]), *np.percentile(batch, [50, 99])]
            print(f"| {count:,} | {name} | {prepared:.1f} | {' | '.join(f'{f:.2f}' for f in figures)} |", flush=True)


def _opened(name: str) -> Router:
    plugin, _, params = name.partition(":")
    kind = plugins.load("router", plugin)
    router: Router = kind(kind.Options.from_mapping(dict(pair.split("=", 1) for pair in params.split(",") if pair)))
    return router


def _milliseconds(router: Router, batches: Sequence[Sequence[RouteRequest]]) -> NDArray[np.float64]:
    spent = []
    for batch in batches:
        started = time.process_time()
        router.route(batch)
        spent.append((time.process_time() - started) * 1000)
    return np.array(spent)


def _made_up(count: int, requests: int, seed: int = 0) -> tuple[list[RoutableExpert], list[RouteRequest]]:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.unique(["".join(row) for row in random.choice(letters, (WORDS * 2, 7))])[:WORDS]
    random.shuffle(words)
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()
    own = random.choice(words, (count, OWN))
    askers = random.integers(count, size=requests)

    def texts(experts: NDArray[np.int64]) -> list[str]:
        """A text of each expert named here: half of its own words, half of all, in any order."""
        of_own = own[experts[:, None], random.integers(OWN, size=(len(experts), 8))]
        of_all = random.choice(words, (len(experts), 8), p=frequency)
        return [" ".join(row) for row in random.permuted(np.concatenate([of_own, of_all], axis=1), axis=1)]

    exemplars = texts(np.repeat(np.arange(count), EXEMPLARS))
    keywords = words[-KEYWORDS:]
    experts = []
    for number in range(count):
        others = random.choice(keywords, PROFILED - 8, replace=False)
        rights = random.integers(0, 15, len(others))
        votes = {str(word): (float(n), 20.0 - n) for word, n in zip(others, rights, strict=True)}
        votes |= {str(word): (18.0, 2.0) for word in own[number][:8]}
        experts.append(
            RoutableExpert(
                f"x{number:05}",
                tuple(exemplars[number * EXEMPLARS : (number + 1) * EXEMPLARS]),
                (f"skill {number}",),
                description=" ".join(own[number][:12]),
                keyword_votes=votes,
            )
        )
    return experts, [RouteRequest(f"r{i}", (Message("user", one),)) for i, one in enumerate(texts(askers))]


if __name__ == "__main__":
    main()
