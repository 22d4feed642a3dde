"""Experts of which one is right on each skill, and what was observed of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from xpert import plugins
from xpert.protocols import Observations, RoutableExpert, RouteRequest
from xpert.records import Message, Row

SKILLS = ("arithmetic", "casing", "reversal")
"""These have an expert; the base is the best in colour and city."""


def experts_of(rows: Sequence[Row], skills: Sequence[str] = SKILLS) -> list[RoutableExpert]:
    """Expert i has 1000 (i + 1) parameters and takes i + 1 seconds."""
    return [
        RoutableExpert(
            f"x/{skill}",
            tuple(row.prompt for row in rows if row.skill == skill),
            (skill,),
            costs={"parameters": 1000.0 * (place + 1), "seconds": 1.0 + place},
        )
        for place, skill in enumerate(skills)
    ]


def requests_of(rows: Sequence[Row]) -> list[RouteRequest]:
    return [RouteRequest(row.id, row.messages, row.skill) for row in rows]


def request(text: str, name: str = "1") -> RouteRequest:
    return RouteRequest(name, (Message("user", text),))


def observed(
    experts: Sequence[RoutableExpert], requests: Sequence[RouteRequest], *, noise: float = 0.0, seed: int = 0
) -> Observations:
    """Each expert scores 1 on its own skills and 0 elsewhere, the base 0.5; losses are 2 - score.

    The base is sure (0.9) where no expert is better, and else not (0.3). `noise`: the share of experts' scores that are
    turned around.
    """
    r = random.Random(seed)
    subjects = (*(expert.key for expert in experts), "base")
    scores = np.full((len(requests), len(subjects)), 0.5)
    confidences = np.full(scores.shape, 0.6)
    for row, asked in enumerate(requests):
        for column, expert in enumerate(experts):
            right = asked.skill in expert.skills
            scores[row, column] = float(right != (r.random() < noise))
        confidences[row, -1] = 0.3 if any(asked.skill in expert.skills for expert in experts) else 0.9
        confidences[row, -1] += 0.001 * row / len(requests)
    return Observations(tuple(requests), subjects, scores, 2 - scores, confidences)


def learned(name: str, experts: Sequence[RoutableExpert], seen: Observations, *, seed: int = 0, **params: Any) -> Any:
    """(the router that learned, its state)."""
    kind = plugins.load("router", name)
    router = kind(kind.Options.from_mapping(params), seed=seed)
    return router, router.learn(experts, seen)


def opened(name: str, experts: Sequence[RoutableExpert], state: Any, **params: Any) -> Any:
    kind = plugins.load("router", name)
    router = kind(kind.Options.from_mapping(params), state=state)
    router.prepare(experts)
    return router
