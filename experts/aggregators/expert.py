"""The aggregator expert: one model reads all replies and writes the final answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput, unknown
from xpert.experts.aggregators._prompting import cut_text, merging_messages, without_thinking
from xpert.experts.aggregators._voting import BASE, Ballot, alone, asks_of, chance_order, members_of, noted, vote
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["AUTO", "PLUGIN", "ExpertAggregator", "ExpertOptions", "write_final"]

AUTO = "auto"
_LEAST_CHARACTERS = 40


@dataclass(frozen=True)
class ExpertOptions(Config):
    expert: str = option(
        BASE,
        "who reads the replies: `base`, an expert of the mixture, or `auto`: the one that `xpert aggregator choose` "
        "has yet to find",
    )


class ExpertAggregator:
    """Every expert of the route answers by itself; then one model reads the replies and writes the answer.

    Replies stand in the prompt without their thinking, in an order drawn by the seed from their experts, so that none
    is favoured by its place. Where they do not fit the context, all are cut alike, and the log says so; where a few
    words of each do not, they vote, and the reason says so. `xpert aggregator choose` finds who aggregates best, on
    replies of which one is right. The answer counts as the route's experts'; the log names who wrote it.

    Cost: one reply per expert of the route, and one that reads them all. Source: Symbolic-MoE
    (https://arxiv.org/abs/2503.05641) with the prompt of mixture-of-agents. Where a question has fewer than two wrong
    replies, the release's test of aggregators fills up with empty strings; the one here takes wrong answers to others.
    """

    Options: ClassVar[type[Config]] = ExpertOptions
    several: ClassVar[bool] = True
    cost: ClassVar[str] = "one reply per expert of the route, and one whose prompt holds them"
    source: ClassVar[str] = "Symbolic-MoE, https://arxiv.org/abs/2503.05641"

    def __init__(self, options: ExpertOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        self.seed = seed

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput where nobody has been chosen yet, NotFound for one that is not of the mixture."""
        if self.options.expert == AUTO:
            raise BadInput(
                "who aggregates has not been chosen for this mixture",
                hint="choose with `xpert aggregator choose MIXTURE --on SUITE -o FILE`, or give expert=base",
            )
        keys = [expert.key for expert in experts]
        if self.options.expert not in (BASE, *keys):
            raise unknown("expert", self.options.expert, (BASE, *keys), where="aggregator expert")

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        keys, asks = asks_of(question)
        replies = [reply for reply in (yield asks) if isinstance(reply, Answer)]
        order = chance_order(self.seed, question, keys)
        texts = [without_thinking(replies[place].text) for place in order]
        try:
            final, cut = yield from write_final(question, texts, self.options.expert)
        except BadInput:
            ballots = [Ballot(alone(key), reply) for key, reply in zip(keys, replies, strict=True)]
            return noted(vote(ballots, question, "auto"), "no replies fit the context behind the question")
        log = {
            "aggregator": self.options.expert,
            "replies": [{"expert": keys[place], "text": replies[place].text} for place in order],
            "cut_to_characters": cut,
        }
        reason = f"{self.options.expert} wrote it from {len(replies)} {'reply' if len(replies) == 1 else 'replies'}"
        if cut is not None:
            reason += f", cut to {cut} characters each to fit the context"
        return Verdict(final.text, members_of(question), reason, final.finished, log)


def write_final(
    question: Question, texts: Sequence[str], expert: str
) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], tuple[Answer, int | None]]:
    """The step in which `expert` writes the one answer from replies: the answer, and to how many characters these were
    cut.

    Raises BadInput where even replies of a few words do not fit the context.
    """
    cut = None
    while True:
        try:
            found = yield [Ask(merging_messages(question.messages, texts), alone(expert), question.sampling)]
        except BadInput:
            longest = max(len(text) for text in texts)
            if longest <= _LEAST_CHARACTERS:
                raise
            cut = max(_LEAST_CHARACTERS, longest // 2)
            texts = [cut_text(text, cut) for text in texts]
            continue
        final = found[0]
        assert isinstance(final, Answer)
        return final, cut


PLUGIN = ExpertAggregator
