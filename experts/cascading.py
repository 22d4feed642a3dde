"""Two stages: who answers first, how sure the answer is, and who answers anew where it is not sure enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from xpert.protocols import Route, Sampling, TokenLogprob

__all__ = ["confidence_of", "escalated", "first_stage", "unsure"]


def first_stage(route: Route, sampling: Sampling) -> Sampling:
    """The sampling of a first answer: with its tokens' log-probabilities, where they decide about a second."""
    if route.escalation is None or sampling.logprobs is not None:
        return sampling
    return dataclasses.replace(sampling, logprobs=0)


def confidence_of(tokens: Sequence[TokenLogprob]) -> float:
    """The geometric mean of the tokens' probabilities, in [0, 1]; 0 for an answer without tokens."""
    if not tokens:
        return 0.0
    return math.exp(min(0.0, math.fsum(token.logprob for token in tokens) / len(tokens)))


def unsure(route: Route, confidence: float) -> bool:
    """Whether the route's second stage answers anew."""
    return route.escalation is not None and confidence < route.escalation.below


def escalated(route: Route, confidence: float) -> Route:
    """The route of the second answer; its reason says why there is one."""
    assert route.escalation is not None, "a route without a second stage"
    second = route.escalation
    named = " + ".join(key for key, _ in second.experts) or "the base"
    why = f"the first answer's confidence {confidence:.2f} is under {second.below:.2f}: {named} answers anew"
    return dataclasses.replace(route, experts=second.experts, reason=f"{route.reason}; {why}")
