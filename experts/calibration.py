"""From a router's scores to chances: what its choice is worth, and when the base model should answer instead.

Any router's score of the expert it chose is comparable within that router only. On observed prompts, isotonic
regression turns it into the expected score of that expert's answer, which is a chance where answers are right or wrong.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xpert.protocols import Route

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Knots of a rising curve, score -> chance, flat beyond its ends.

    The base answers a prompt whose score is below `reject_below` (None: never). `figures` say what it was made from.
    """

    scores: tuple[float, ...]
    chances: tuple[float, ...]
    reject_below: float | None = None
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.chances) or not self.scores:
            raise ValueError("a calibration needs as many chances as scores")
        if list(self.scores) != sorted(set(self.scores)):
            raise ValueError("the scores of a calibration must rise")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        below = value.get("reject_below")
        return cls(
            tuple(float(score) for score in value["scores"]),
            tuple(float(chance) for chance in value["chances"]),
            float(below) if below is not None else None,
            dict(value.get("figures") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "scores": list(self.scores),
            "chances": list(self.chances),
            "reject_below": self.reject_below,
            "figures": dict(self.figures),
        }

    def chance(self, score: float) -> float:
        """Linear between knots."""
        place = bisect.bisect_right(self.scores, score)
        if place == 0:
            return self.chances[0]
        if place == len(self.scores):
            return self.chances[-1]
        low, high = self.scores[place - 1], self.scores[place]
        share = (score - low) / (high - low)
        return self.chances[place - 1] + share * (self.chances[place] - self.chances[place - 1])

    def applied(self, route: Route) -> Route:
        """The route with its chance, or the base's route where its score is too low. One without experts stays."""
        if not route.experts or not route.candidates:
            return route
        first = route.experts[0][0]
        score = next((candidate.score for candidate in route.candidates if candidate.expert == first), None)
        if score is None:
            return route
        chance = self.chance(score)
        if self.reject_below is not None and score < self.reject_below:
            under = f"its score {score:.3g} is under the calibrated {self.reject_below:.3g}"
            reason = f"{route.reason}; {under}: the base answers"
            return dataclasses.replace(route, experts=(), reason=reason, escalation=None, chance=chance)
        return dataclasses.replace(route, reason=f"{route.reason}; calibrated chance {chance:.2f}", chance=chance)
