"""Majority vote: what most of a route's experts answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.experts.aggregators._voting import Ballot, vote
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["PLUGIN", "MajorityAggregator"]


@dataclass(frozen=True)
class MajorityOptions(Config):
    weigh: bool = option(False, "each vote counts as much as the expert weighs in the route, instead of 1")


class MajorityAggregator:
    """Every expert of the route answers by itself; the answer that most give is the reply, in the words of the heaviest
    expert that gives it. A tie goes to the answer of the heaviest expert."""

    Options: ClassVar[type[Config]] = MajorityOptions
    cost: ClassVar[str] = "one reply per expert of the route"
    source: ClassVar[str] = "self-consistency over models, https://arxiv.org/abs/2203.11171"

    def __init__(self, options: MajorityOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        members = question.route.experts or (("base", 1.0),)
        asks = [
            Ask(question.messages, ((key, 1.0),) if question.route.experts else (), question.sampling)
            for key, _ in members
        ]
        replies = [reply for reply in (yield asks) if isinstance(reply, Answer)]
        ballots = [
            Ballot(key, reply, weight if self.options.weigh else 1.0)
            for (key, weight), reply in zip(members, replies, strict=True)
        ]
        return vote(ballots, question)


PLUGIN = MajorityAggregator
