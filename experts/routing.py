"""A mixture's router, made ready: prompts in, weighted experts and reasons out. Loads no language model unless the
router's embedder is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from xpert import plugins
from xpert.experts.mixture import Mixture, router_options
from xpert.experts.router_state import read_router_state
from xpert.experts.routers._learning import untrained
from xpert.protocols import Escalation, Route, Router, RouteRequest, RouterState
from xpert.records import Row

__all__ = ["MixtureRouter", "explain", "open_router", "options_for", "route_request"]


class MixtureRouter:
    """The router of a mixture after `prepare`, with the mixture's calibration and its experts' weights applied.

    `router`: one that is ready already, in place of the mixture's own.
    """

    def __init__(self, mixture: Mixture, *, router: Router | None = None, seed: int = 0, device: str = "auto") -> None:
        if router is None:
            router = open_router(mixture, options_for(mixture), seed=seed, device=device)
            router.prepare([expert.routable() for expert in mixture.experts])
        self.router: Router = router
        self._calibration = mixture.calibration
        self._gate = mixture.gate.name if mixture.gate is not None else None
        self._weight = {expert.key: expert.weight for expert in mixture.experts}

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        routes = [self._weighted(route) for route in self.router.route(requests)]
        if self._calibration is None:
            return routes
        return [self._calibration.applied(route) for route in routes]

    def _weighted(self, route: Route) -> Route:
        if self._gate is not None and route.experts:
            return dataclasses.replace(route, reason=f"{route.reason}; gate {self._gate} weighs them at every token")
        if len(route.experts) < 2 or all(self._weight[key] == 1 for key, _ in route.experts):
            return route
        scaled = [(key, weight * self._weight[key]) for key, weight in route.experts]
        total = sum(weight for _, weight in scaled)
        scaled.sort(key=lambda pair: (-pair[1], pair[0]))
        return dataclasses.replace(route, experts=tuple((key, weight / total) for key, weight in scaled))


def options_for(mixture: Mixture) -> Any:
    """The options of the mixture's router; one that can use the base model is told which one it is."""
    options = router_options(mixture.router, mixture.router_params)
    if getattr(options, "base", "") is None:
        options = dataclasses.replace(options, base=mixture.base.ref)
    return options


def open_router(mixture: Mixture, options: Any, *, seed: int, device: str) -> Router:
    """The mixture's router before `prepare`, with what it has learned. Raises BadInput for one that has not."""
    plugin = plugins.load("router", mixture.router)
    if not getattr(plugin, "learned", False):
        made: Router = plugin(options, seed=seed, device=device)
        return made
    if mixture.router_state is None:
        if getattr(plugin, "untrained", _never)(options):
            return _opened(plugin, options, None, seed, device)
        raise untrained(mixture.router)
    return _opened(plugin, options, read_router_state(mixture.router_state.file), seed, device)


def _opened(plugin: Any, options: Any, state: RouterState | None, seed: int, device: str) -> Router:
    learned: Router = plugin(options, state=state, seed=seed, device=device)
    return learned


def _never(options: Any) -> bool:
    return False


def route_request(row: Row) -> RouteRequest:
    return RouteRequest(row.id, row.messages, row.skill)


def explain(request_id: str, route: Route) -> dict[str, Any]:
    """A route as plain JSON: what `xpert route` prints and the server answers."""
    return {
        "id": request_id,
        "experts": [{"expert": key, "weight": round(weight, 6)} for key, weight in route.experts],
        "candidates": [{"expert": c.expert, "score": round(c.score, 6)} for c in route.candidates],
        "reason": route.reason,
        **({"chance": round(route.chance, 4)} if route.chance is not None else {}),
        **({"escalation": _escalation(route.escalation)} if route.escalation is not None else {}),
    }


def _escalation(second: Escalation) -> dict[str, Any]:
    return {
        "experts": [{"expert": key, "weight": round(weight, 6)} for key, weight in second.experts],
        "below": second.below,
    }
