"""Best of N: of several replies, the one that a model finds likeliest per token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.errors import unknown
from xpert.experts.aggregators._prompting import mean_logprob
from xpert.experts.aggregators._voting import BASE, alone, members_of, rounded, sampled
from xpert.protocols import (
    Answer,
    Ask,
    Question,
    RoutableExpert,
    Verdict,
    Weigh,
    Weighed,
    WeightedExperts,
)

__all__ = ["PLUGIN", "BestOfAggregator", "BestOfOptions"]

ROUTE = "route"


@dataclass(frozen=True)
class BestOfOptions(Config):
    samples: int = option(4, "replies of each writer; a single one is not sampled, but as the question is", minimum=1)
    writers: str = option(
        "each", "who replies: each expert of the route by itself, or all as one", choices=("each", "route")
    )
    under: str = option(ROUTE, "who finds a reply likely: `route`, `base` or an expert of the mixture")
    temperature: float = option(0.7, "of the samples, where the question is asked greedily", minimum=1e-6)


class BestOfAggregator:
    """Several replies; the one with the highest mean log-probability of a token under one model is given.

    Under `route` the route's experts judge, weighted as one. Empty replies lose to all others. Equal replies are
    weighed once, and of equal likelihoods the earliest reply wins, the heaviest expert's first.

    Cost: `samples` replies per writer, and one pass over each distinct one. Source: best-of-n reranking by length
    normalised likelihood, https://arxiv.org/abs/2001.09977.
    """

    Options: ClassVar[type[Config]] = BestOfOptions
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "`samples` replies per writer, and a likelihood of each distinct one"
    source: ClassVar[str] = "sample and rank, https://arxiv.org/abs/2001.09977"

    def __init__(self, options: BestOfOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises NotFound for a judge that is not of the mixture."""
        known = (BASE, ROUTE, *(expert.key for expert in experts))
        if self.options.under not in known:
            raise unknown("expert", self.options.under, known, where="aggregator best-of")

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        members = members_of(question)
        writers: list[WeightedExperts] = [members]
        if members and self.options.writers == "each":
            writers = [alone(key) for key, _ in members]
        several = self.options.samples > 1
        sampling = sampled(question.sampling, self.options.temperature) if several else question.sampling
        whose = [writer for writer in writers for _ in range(self.options.samples)]
        found = yield [Ask(question.messages, writer, sampling) for writer in whose]
        replies = [reply for reply in found if isinstance(reply, Answer)]
        texts = list(dict.fromkeys(reply.text for reply in replies))
        judge = members if self.options.under == ROUTE else alone(self.options.under)
        weighed = (yield [Weigh(question.messages, judge, tuple(texts))])[0]
        assert isinstance(weighed, Weighed)
        likely = {t: round(mean_logprob(one), 6) for t, one in zip(texts, weighed.logprobs, strict=True)}
        best = max(range(len(replies)), key=lambda place: (likely[replies[place].text], -place))
        log = {
            "under": self.options.under,
            "replies": [
                {
                    "experts": [key for key, _ in writer],
                    "text": reply.text,
                    "mean_logprob": rounded(likely[reply.text]),
                }
                for writer, reply in zip(whose, replies, strict=True)
            ],
        }
        chosen = replies[best]
        shown = rounded(likely[chosen.text])
        reason = f"likeliest of {len(replies)} replies under {self.options.under}"
        reason += f", {shown:.2f} nats per token" if shown is not None else ", all of them empty"
        return Verdict(chosen.text, whose[best], reason, chosen.finished, log)


PLUGIN = BestOfAggregator
