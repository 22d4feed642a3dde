"""The random control: experts drawn with equal chances, whatever the prompt says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from xpert.config import Config, option
from xpert.experts.routers._choice import ranked
from xpert.protocols import RoutableExpert, Route, RouteRequest

__all__ = ["PLUGIN", "UniformRouter"]


@dataclass(frozen=True)
class UniformOptions(Config):
    top: int = option(1, "how many experts are drawn, with equal weights", minimum=1)


class UniformRouter:
    """Draws from the hash of (seed, request id, expert): the batch, its order and the other experts change nothing."""

    Options = UniformOptions

    def __init__(self, options: UniformOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        self.seed = seed
        self.keys: list[str] = []

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        self.keys = [expert.key for expert in experts]

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        return [self._route(request) for request in requests]

    def _route(self, request: RouteRequest) -> Route:
        candidates = ranked({key: self._draw(request.id, key) for key in self.keys})
        drawn = [candidate.expert for candidate in candidates[: self.options.top]]
        named = " + ".join(drawn) or "the base model"
        reason = f"random: drew {named} of {len(self.keys)} (seed {self.seed}, request {request.id})"
        return Route(tuple((key, 1 / len(drawn)) for key in drawn), candidates, reason)

    def _draw(self, request_id: str, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}\0{request_id}\0{key}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


PLUGIN = UniformRouter
