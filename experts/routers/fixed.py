"""The same experts for every prompt: one, a weighted set, or the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.routers._choice import check_known
from xpert.protocols import Candidate, RoutableExpert, Route, RouteRequest, WeightedExperts

__all__ = ["PLUGIN", "FixedRouter"]


@dataclass(frozen=True)
class FixedOptions(Config):
    expert: str | None = option(None, "the expert that answers everything, or `base`")
    weights: tuple[str, ...] = option((), "several experts as KEY:WEIGHT,KEY:WEIGHT; normalised to sum to 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert is not None and self.weights:
            raise BadInput("expert and weights exclude each other", hint="give one of them")


class FixedRouter:
    """Every prompt goes to the experts named in the options; without any, to all experts equally."""

    Options = FixedOptions

    def __init__(self, options: FixedOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        self.route_of_all: Route | None = None

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        keys = [expert.key for expert in experts]
        chosen = self._weights(keys)
        total = sum(weight for _, weight in chosen)
        weights: WeightedExperts = tuple(
            (key, weight / total) for key, weight in sorted(chosen, key=lambda pair: (-pair[1], pair[0]))
        )
        share = dict(weights)
        candidates = tuple(Candidate(key, share.get(key, 0.0)) for key in [*share, *sorted(set(keys) - share.keys())])
        named = " + ".join(f"{key} {weight:.2f}" for key, weight in weights) or "the base model"
        self.route_of_all = Route(weights, candidates, f"fixed: every prompt goes to {named}")

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        assert self.route_of_all is not None, "prepare() comes first"
        return [self.route_of_all] * len(requests)

    def _weights(self, keys: list[str]) -> list[tuple[str, float]]:
        if self.options.expert == "base":
            return []
        if self.options.expert is not None:
            check_known(self.options.expert, [*keys, "base"])
            return [(self.options.expert, 1.0)]
        if not self.options.weights:
            return [(key, 1.0) for key in keys]
        parsed = [_parse(text) for text in self.options.weights]
        for key, _ in parsed:
            check_known(key, keys)
        if len({key for key, _ in parsed}) < len(parsed):
            raise BadInput("weights names an expert twice")
        return parsed


def _parse(text: str) -> tuple[str, float]:
    key, colon, number = text.strip().rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not colon or not 0 < weight < float("inf"):
        raise BadInput(f"weights: {text!r} is not KEY:WEIGHT with a weight above 0", hint="as in weights=a:0.7,b:0.3")
    return key, weight


PLUGIN = FixedRouter
