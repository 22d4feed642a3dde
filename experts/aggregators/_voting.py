"""What votes share: which answer a reply gives, and who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpert.protocols import Answer, Question, Verdict

__all__ = ["Ballot", "answer_of", "vote"]


@dataclass(frozen=True)
class Ballot:
    """One reply, whose it is, and how much it counts."""

    expert: str
    reply: Answer
    weight: float = 1.0


def answer_of(text: str, choices: Sequence[str] = ()) -> str:
    """What two replies are compared by: the whole reply, but for case and white space."""
    return " ".join(text.split()).casefold()


def vote(ballots: Sequence[Ballot], question: Question) -> Verdict:
    """The answer with the most weight, in the words of its first ballot; of equal ones the first given."""
    totals: dict[str, float] = {}
    first: dict[str, Ballot] = {}
    for ballot in ballots:
        answer = answer_of(ballot.reply.text, question.choices)
        totals[answer] = totals.get(answer, 0.0) + ballot.weight
        first.setdefault(answer, ballot)
    best = max(totals, key=lambda answer: totals[answer])
    backers = [b for b in ballots if answer_of(b.reply.text, question.choices) == best]
    share = totals[best] / sum(totals.values())
    experts = tuple((b.expert, b.weight / totals[best]) for b in backers if b.expert != "base")
    log = {
        "votes": [{"expert": b.expert, "weight": b.weight, "text": b.reply.text} for b in ballots],
        "share": share,
    }
    reason = f"{len(backers)} of {len(ballots)} replies say so, with {share:.0%} of the votes"
    return Verdict(first[best].reply.text, experts, reason, first[best].reply.finished, log)
