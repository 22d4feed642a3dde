"""Routes by a router that has not seen the prompts it is measured on.

A router that learns is trained on all folds but one and routes that one, fold by fold; what it does with each prompt
is what it would have done with a new one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.mixture import Mixture, router_options
from xpert.experts.router_learning.observations import Observed, prompt_hash
from xpert.experts.router_state import read_router_state
from xpert.experts.routing import MixtureRouter, options_for
from xpert.progress import SILENT, Progress
from xpert.protocols import LearnedRouter, Route, RouteRequest, RouterState

__all__ = ["FOLDS", "TRAINED_ON", "Routed", "folds_of", "learn_router", "learns", "routes_of"]

FOLDS = 5
TRAINED_ON = "trained_on"
"""The fact of a router's state that says what it was trained on; routers pass over it."""


@dataclass(frozen=True)
class Routed:
    """Routes of prompts, in order, and the seconds that routing took.

    `how`: "as it is" (it learns nothing, or learned from other prompts), "in 5 folds", or "trained on the others".
    `router`: one that is ready, to ask more of.
    """

    routes: tuple[Route, ...]
    how: str
    router: object
    seconds: float


def learns(router: str, params: Mapping[str, Any]) -> bool:
    """Whether a router, with these parameters, has to be trained on observations."""
    plugin = plugins.load("router", router)
    if not getattr(plugin, "learned", False):
        return False
    untrained = getattr(plugin, "untrained", None)
    return untrained is None or not untrained(router_options(router, params))


def learn_router(
    mixture: Mixture, observed: Observed, rows: Sequence[int], *, seed: int = 0, device: str = "auto"
) -> tuple[LearnedRouter, RouterState]:
    """The mixture's router, trained on some of the observed prompts, by their places; ready to route."""
    plugin = plugins.load("router", mixture.router)
    router: LearnedRouter = plugin(options_for(mixture), state=None, seed=seed, device=device)
    return router, router.learn([expert.routable() for expert in mixture.experts], observed.subset(rows).observations)


def routes_of(
    mixture: Mixture,
    observed: Observed,
    *,
    held_out: Observed | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Routed:
    """How the mixture's router, not having seen them, routes the observed prompts, or with `held_out` those.

    A router that learns is used as it is where it was trained on other prompts; else it is trained anew, in folds over
    the observed prompts, or with `held_out` on all of them. The mixture's calibration is not applied.
    """
    mixture = replace(mixture, calibration=None)
    requests = list((held_out or observed).observations.requests)
    if not learns(mixture.router, mixture.router_params) or _trained_elsewhere(mixture, requests):
        return _timed(MixtureRouter(mixture, seed=seed, device=device), requests, "as it is")
    if held_out is None:
        return _in_folds(mixture, observed, folds=folds, seed=seed, device=device, progress=progress)
    shared = set(observed.prompt_hashes) & set(held_out.prompt_hashes)
    if shared:
        raise BadInput(
            f"{len(shared):,} of the held-out prompts are among those that routers are trained on",
            where=str(held_out.folder),
            hint="hold out others, or leave --held-out away for folds",
        )
    learned, _ = learn_router(mixture, observed, range(len(observed)), seed=seed, device=device)
    return _timed(MixtureRouter(mixture, router=learned), requests, "trained on the others")


def folds_of(observed: Observed, folds: int, seed: int) -> list[list[int]]:
    """Places of the prompts of each fold: equal prompts fall into one, and each skill is spread evenly over all.

    Raises BadInput where there are fewer distinct prompts than folds.
    """
    groups: dict[str, list[int]] = {}
    for place, value in enumerate(observed.prompt_hashes):
        groups.setdefault(value, []).append(place)
    if len(groups) < folds:
        raise BadInput(
            f"{len(groups)} distinct prompts are too few for {folds} folds",
            where=str(observed.folder),
            hint="observe a larger suite",
        )
    every = list(groups.values())
    shuffled = [every[index] for index in np.random.default_rng(seed).permutation(len(every))]
    requests = observed.observations.requests
    shuffled.sort(key=lambda places: requests[places[0]].skill or "")
    parts: list[list[int]] = [[] for _ in range(folds)]
    for number, places in enumerate(shuffled):
        parts[number % folds] += places
    return [sorted(part) for part in parts]


def _in_folds(
    mixture: Mixture, observed: Observed, *, folds: int, seed: int, device: str, progress: Progress
) -> Routed:
    requests = observed.observations.requests
    routes: dict[int, Route] = {}
    seconds = 0.0
    router: object = None
    with progress.task(f"training {mixture.router} in folds", total=folds) as task:
        for part in folds_of(observed, folds, seed):
            left_out = set(part)
            rest = [place for place in range(len(requests)) if place not in left_out]
            learned, _ = learn_router(mixture, observed, rest, seed=seed, device=device)
            found = _timed(MixtureRouter(mixture, router=learned), [requests[place] for place in part], "")
            routes |= dict(zip(part, found.routes, strict=True))
            seconds, router = seconds + found.seconds, found.router
            task.advance()
    return Routed(tuple(routes[place] for place in range(len(requests))), f"in {folds} folds", router, seconds)


def _timed(router: MixtureRouter, requests: Sequence[RouteRequest], how: str) -> Routed:
    begun = time.perf_counter()
    routes = tuple(router.route(requests))
    return Routed(routes, how, router.router, time.perf_counter() - begun)


def _trained_elsewhere(mixture: Mixture, requests: Sequence[RouteRequest]) -> bool:
    """Whether the mixture's router is trained, and none of the requests was among what it learned from."""
    if mixture.router_state is None:
        return False
    told = read_router_state(mixture.router_state.file).facts.get(TRAINED_ON)
    known = set(told.get("prompts", ())) if isinstance(told, Mapping) else set()
    return not any(prompt_hash(request) in known for request in requests)
