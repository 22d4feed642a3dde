"""Majority vote: what most of a route's experts answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

from xpert.config import Config
from xpert.experts.aggregators._voting import Ballot, ComparingOptions, alone, asks_of, vote
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["PLUGIN", "MajorityAggregator"]


class MajorityAggregator:
    """Every expert of the route answers by itself; the answer that most give is the reply, in the words of the heaviest
    expert that gives it. A tie goes to the answer of the heaviest expert.

    Cost: one reply per expert of the route. Source: self-consistency (https://arxiv.org/abs/2203.11171), over experts
    instead of samples.
    """

    Options: ClassVar[type[Config]] = ComparingOptions
    several: ClassVar[bool] = True
    cost: ClassVar[str] = "one reply per expert of the route"
    source: ClassVar[str] = "self-consistency over experts, https://arxiv.org/abs/2203.11171"

    def __init__(self, options: ComparingOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        keys, asks = asks_of(question)
        replies = [reply for reply in (yield asks) if isinstance(reply, Answer)]
        ballots = [Ballot(alone(key), reply) for key, reply in zip(keys, replies, strict=True)]
        return vote(ballots, question, self.options.by)


PLUGIN = MajorityAggregator
