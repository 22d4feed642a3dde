"""What a router's choices were worth on observed prompts: plain figures over arrays.

Arrays: n prompts, m subjects (the experts, then the base); a route's subject is its heaviest expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.experts.mixture import BASE
from xpert.protocols import Observations, Route, WeightedExperts

__all__ = [
    "BINS",
    "Bin",
    "Obtained",
    "RiskCoverage",
    "calibration_error",
    "chosen_scores",
    "obtained",
    "reliability",
    "risk_coverage",
]

BINS = 10
_POINTS = 20

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Obtained:
    """What routes brought on observed prompts.

    subjects [n]: the place of the subject that answered last; scores [n]: what its answer earned; answers [n]: how
    many answers were generated; escalated [n]: whether the second stage answered.
    """

    subjects: NDArray[np.int64]
    scores: _Floats
    answers: NDArray[np.int64]
    escalated: NDArray[np.bool_]


@dataclass(frozen=True)
class Bin:
    """Prompts whose chance lies in [low, high): how many, their mean chance and mean score."""

    low: float
    high: float
    n: int
    chance: float
    score: float


@dataclass(frozen=True)
class RiskCoverage:
    """A reject option, point by point: only the share `coverage` of all prompts with the surest routes is accepted.

    accepted: mean score of those; with_base: mean score over all prompts where the base answers the others; below: the
    confidence under which a prompt is not accepted. `area` is the mean of 1 - accepted over all coverages that were
    reached, the less the better.
    """

    coverage: tuple[float, ...]
    accepted: tuple[float, ...]
    with_base: tuple[float, ...]
    below: tuple[float, ...]
    area: float


def obtained(routes: Sequence[Route], seen: Observations) -> Obtained:
    """The subject of every route and what it earned; a second stage answers where the first was not sure enough.

    Raises BadInput where routes escalate and the confidences were not observed.
    """
    place = {key: index for index, key in enumerate(seen.subjects)}
    subjects = np.array([place[_heaviest(route.experts)] for route in routes], dtype=np.int64)
    rows = np.arange(len(routes))
    answers = np.array([max(1, len(route.experts)) for route in routes], dtype=np.int64)
    escalated = np.zeros(len(routes), dtype=bool)
    if any(route.escalation is not None for route in routes) and seen.confidences is None:
        raise BadInput("the observations hold no confidences, by which a cascade decides", hint="observe again")
    for row, route in enumerate(routes):
        if route.escalation is None or seen.confidences is None:
            continue
        sure = float(seen.confidences[row, subjects[row]])
        if not sure >= route.escalation.below:  # an answer without tokens has no confidence
            escalated[row] = True
            subjects[row] = place[_heaviest(route.escalation.experts)]
            answers[row] += max(1, len(route.escalation.experts))
    return Obtained(subjects, seen.scores[rows, subjects], answers, escalated)


def chosen_scores(routes: Sequence[Route]) -> _Floats:
    """[n] the router's score of the expert it chose; NaN where the base answers, or a route has no candidates."""
    found = np.full(len(routes), math.nan)
    for row, route in enumerate(routes):
        if route.experts:
            first = route.experts[0][0]
            found[row] = next((c.score for c in route.candidates if c.expert == first), math.nan)
    return found


def reliability(chances: _Floats, scores: _Floats) -> list[Bin]:
    """Ten bins of equal width over [0, 1], those that hold a prompt."""
    places = np.clip((chances * BINS).astype(np.int64), 0, BINS - 1)
    return [
        Bin(
            place / BINS,
            (place + 1) / BINS,
            int(inside.sum()),
            float(chances[inside].mean()),
            float(scores[inside].mean()),
        )
        for place in range(BINS)
        if (inside := places == place).any()
    ]


def calibration_error(chances: _Floats, scores: _Floats) -> float:
    """Expected calibration error (Naeini et al. 2015): mean over prompts of |mean chance - mean score| of their bin."""
    return sum(one.n * abs(one.chance - one.score) for one in reliability(chances, scores)) / len(chances)


def risk_coverage(sureness: _Floats, scores: _Floats, base: _Floats) -> RiskCoverage | None:
    """The curve of accepting the surest first; prompts of equal sureness are accepted together.

    sureness [n]: NaN where a prompt can be no more rejected, since the base answers it already. scores, base [n]: what
    the route and the base alone earn. None where there is nothing to reject. At most twenty points.
    """
    ranked = np.flatnonzero(np.isfinite(sureness))
    if not ranked.size:
        return None
    ranked = ranked[np.argsort(-sureness[ranked], kind="stable")]
    ends = np.flatnonzero(np.diff(sureness[ranked], append=-np.inf) != 0) + 1
    n = len(sureness)
    accepted = np.cumsum(scores[ranked])[ends - 1] / ends
    gained = np.cumsum(scores[ranked] - base[ranked])[ends - 1]
    with_base = base.sum() / n + gained / n
    area = float(np.average(1 - accepted, weights=np.diff(ends, prepend=0)))
    shown = np.unique(np.linspace(0, len(ends) - 1, min(_POINTS, len(ends))).round().astype(int))
    return RiskCoverage(
        tuple((ends[shown] / n).tolist()),
        tuple(accepted[shown].tolist()),
        tuple(with_base[shown].tolist()),
        tuple(sureness[ranked][ends[shown] - 1].tolist()),
        area,
    )


def _heaviest(experts: WeightedExperts) -> str:
    return experts[0][0] if experts else BASE
