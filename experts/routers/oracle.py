"""The bound for evaluations: reads the skill that the evaluated item is labelled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpert.config import Config
from xpert.errors import BadInput
from xpert.experts.routers._choice import ranked
from xpert.protocols import RoutableExpert, Route, RouteRequest

__all__ = ["PLUGIN", "OracleRouter"]


@dataclass(frozen=True)
class OracleOptions(Config):
    pass


class OracleRouter:
    """An expert made for the prompt's skill: of several, the one with the best profile score on it.

    Where none was made for it, the best profiled one on that skill; where none is profiled on it, the base model.
    Candidates score 1 + profile if made for the skill, else the profile score. For evaluation only: raises BadInput
    for a prompt without a skill.
    """

    Options = OracleOptions

    def __init__(self, options: OracleOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.experts: list[RoutableExpert] = []

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        self.experts = list(experts)

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        return [self._route(request) for request in requests]

    def _route(self, request: RouteRequest) -> Route:
        skill = request.skill
        if not skill:
            raise BadInput(
                f"the oracle router needs the skill of prompt {request.id!r}",
                hint="it is for evaluation only; add a `skill` column, or mix with another router",
            )
        scores = {e.key: (skill in e.skills) + e.skill_scores.get(skill, 0.0) for e in self.experts}
        candidates = ranked(scores)
        if not candidates or candidates[0].score <= 0:
            return Route((), candidates, f"oracle: no expert was made for or profiled on {skill!r}; the base answers")
        best = candidates[0].expert
        made = next(skill in expert.skills for expert in self.experts if expert.key == best)
        why = f"was made for {skill!r}" if made else f"has the best profile on {skill!r}"
        return Route(((best, 1.0),), candidates, f"oracle: {best} {why}")


PLUGIN = OracleRouter
