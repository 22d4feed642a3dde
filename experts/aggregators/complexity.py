"""Complexity-based consistency: of many sampled answers, the longest reasoned ones vote."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.aggregators._voting import Ballot, ComparingOptions, members_of, sampled, vote
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["PLUGIN", "ComplexityAggregator", "ComplexityOptions", "reasoning_steps"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")


@dataclass(frozen=True)
class ComplexityOptions(ComparingOptions):
    samples: int = option(10, "answers sampled for each question", minimum=1)
    keep: int = option(6, "how many of them vote, those with the most steps", minimum=1)
    temperature: float = option(0.7, "of the samples, where the question is asked greedily", minimum=1e-6)
    steps: str = option("lines", "what counts as a step", choices=("lines", "sentences", "words"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep > self.samples:
            raise BadInput(f"keep is {self.keep}, and only {self.samples} are sampled", hint="give more samples")


class ComplexityAggregator:
    """The route's experts, weighted as one, answer several times; the answers with most reasoning steps vote.

    Answers with equally many steps come in the order they were sampled; a tie of votes goes to the answer that was
    reasoned longest.

    Cost: `samples` replies, whose prompt is computed once where the engine shares prefixes. Source: complexity-based
    prompting (https://arxiv.org/abs/2210.00720), which samples 50 and keeps 30 to 40.
    """

    Options: ClassVar[type[Config]] = ComplexityOptions
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "`samples` replies"
    source: ClassVar[str] = "complexity-based prompting, https://arxiv.org/abs/2210.00720"

    def __init__(self, options: ComplexityOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        members = members_of(question)
        ask = Ask(question.messages, members, sampled(question.sampling, self.options.temperature))
        replies = [reply for reply in (yield [ask] * self.options.samples) if isinstance(reply, Answer)]
        steps = [reasoning_steps(reply.text, self.options.steps) for reply in replies]
        order = sorted(range(len(replies)), key=lambda place: (-steps[place], place))[: self.options.keep]
        ballots = [Ballot(members, replies[place], note={"steps": steps[place]}) for place in order]
        found = vote(ballots, question, self.options.by, counted="longest answers")
        log = {**found.log, "samples": len(replies), "steps": steps}
        return Verdict(found.text, found.experts, found.reason, found.finished, log)


def reasoning_steps(text: str, unit: str) -> int:
    """How many lines, sentences or words a text has."""
    if unit == "words":
        return len(text.split())
    if unit == "sentences":
        return sum(any(c.isalnum() for c in part) for part in _SENTENCE_END.split(text))
    return sum(1 for line in text.splitlines() if line.strip())


PLUGIN = ComplexityAggregator
