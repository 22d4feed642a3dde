"""What aggregators share: who answers a question, and how ballots are counted."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xpert.config import Config, option
from xpert.experts.aggregators._answers import BY, reader
from xpert.protocols import Answer, Ask, Question, Sampling, Verdict, WeightedExperts

__all__ = [
    "BASE",
    "Ballot",
    "ComparingOptions",
    "alone",
    "asks_of",
    "chance_order",
    "members_of",
    "noted",
    "only_reply",
    "rounded",
    "sampled",
    "shares",
    "vote",
]

BASE = "base"


@dataclass(frozen=True)
class ComparingOptions(Config):
    by: str = option("auto", "what two replies are compared by", choices=BY)


@dataclass(frozen=True)
class Ballot:
    """One reply, whose it is, and how much it counts. `note` goes into the log."""

    experts: WeightedExperts
    reply: Answer
    weight: float = 1.0
    note: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def members_of(question: Question) -> WeightedExperts:
    """The experts of a question's route with their weights there, heaviest first, equal ones by key."""
    return tuple(sorted(question.route.experts, key=lambda pair: (-pair[1], pair[0])))


def alone(key: str) -> WeightedExperts:
    """One expert by itself, or the base."""
    return () if key == BASE else ((key, 1.0),)


def asks_of(question: Question) -> tuple[list[str], list[Ask]]:
    """Every expert of the route by itself, and the same question to each; the base, where the route names nobody."""
    keys = [key for key, _ in members_of(question)] or [BASE]
    return keys, [Ask(question.messages, alone(key), question.sampling) for key in keys]


def sampled(sampling: Sampling, temperature: float) -> Sampling:
    """The same with `temperature`, where it was greedy, so that replies to one prompt differ."""
    return sampling if sampling.temperature > 0 else dataclasses.replace(sampling, temperature=temperature)


def chance_order(seed: int, question: Question, names: Sequence[str]) -> list[int]:
    """The places of `names` in an order drawn from their hashes, whatever order they came in."""

    def drawn(place: int) -> bytes:
        text = f"{seed}\0{question.id}\0{names[place]}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    return sorted(range(len(names)), key=drawn)


def shares(members: WeightedExperts, kept: Sequence[str]) -> WeightedExperts:
    """The members that are kept, with weights that sum to 1, heaviest first."""
    weights = {key: weight for key, weight in members if key in kept}
    total = sum(weights.values())
    pairs = [(key, weight / total if total else 1 / len(weights)) for key, weight in weights.items()]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def only_reply(question: Question, reply: Answer, reason: str) -> Verdict:
    """The verdict where there is nothing to aggregate."""
    return Verdict(reply.text, members_of(question), reason, reply.finished, {"replies": 1})


def noted(verdict: Verdict, why: str) -> Verdict:
    """The verdict that is given in place of another one, and why."""
    return dataclasses.replace(verdict, reason=f"{why}: {verdict.reason}", log={**verdict.log, "instead": why})


def vote(ballots: Sequence[Ballot], question: Question, by: str, *, counted: str = "replies") -> Verdict:
    """The answer with the most weight, in the words of its first ballot; of equal ones that of the earliest ballot.

    Replies without an answer count for nothing, unless none has one. `counted` is what ballots are called.
    """
    read = reader(by, question, [ballot.reply.text for ballot in ballots])
    answers = [read(ballot.reply.text) for ballot in ballots]
    totals: dict[str, float] = {}
    for ballot, answer in zip(ballots, answers, strict=True):
        if answer or not any(answers):
            totals[answer] = totals.get(answer, 0.0) + ballot.weight
    # Rounded, so that sums of the same weights in another order are a tie and no victory.
    best = max(totals, key=lambda answer: round(totals[answer], 9))
    backers = [ballot for ballot, answer in zip(ballots, answers, strict=True) if answer == best]
    cast = sum(totals.values())
    share = totals[best] / cast if cast else 0.0
    log = {
        "by": read.by,
        "share": rounded(share),
        "votes": [
            {
                "experts": [key for key, _ in ballot.experts],
                "weight": rounded(ballot.weight),
                "answer": answer,
                "text": ballot.reply.text,
                **ballot.note,
            }
            for ballot, answer in zip(ballots, answers, strict=True)
        ],
    }
    if len(ballots) == 1:
        return Verdict(backers[0].reply.text, _whose(backers), "the only reply", backers[0].reply.finished, log)
    unanimous = f"all {len(ballots)} {counted} agree" if len(backers) == len(ballots) else None
    if len(ballots) == 1:
        unanimous = "there is nothing to compare the one reply with"
    reason = unanimous or f"{len(backers)} of {len(ballots)} {counted} agree, with {share:.0%} of the votes"
    return Verdict(backers[0].reply.text, _whose(backers), reason, backers[0].reply.finished, log)


def _whose(backers: Sequence[Ballot]) -> WeightedExperts:
    """The experts behind ballots, each by the weight of its ballots; all alike where these weigh nothing."""
    total = sum(ballot.weight for ballot in backers)
    weights: dict[str, float] = {}
    for ballot in backers:
        weight = ballot.weight / total if total else 1 / len(backers)
        for key, part in ballot.experts:
            weights[key] = weights.get(key, 0.0) + weight * part
    return tuple(sorted(weights.items(), key=lambda pair: (-pair[1], pair[0])))


def rounded(value: float) -> float | None:
    """A number for a log; None for one that JSON does not know."""
    return round(value, 6) if math.isfinite(value) else None
