"""Mining criteria of quality from a few preferred pairs: written, tried on the pairs, kept, rewritten or banned.

A manager writes criteria as sentences, workers judge the pairs under one criterion at a time. Source: Guo et al. 2025,
arXiv:2502.19279 (CritiQ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.judges import Judge, Question
from xpert.preferences import Votes, ask_votes

__all__ = ["KNOWN", "Criterion", "Measured", "MiningOptions", "majority", "mine", "read_criteria"]

Texts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Criterion:
    """A name and a sentence that says what makes a text better."""

    name: str
    description: str


KNOWN: tuple[Criterion, ...] = (
    Criterion("correctness", "What the text states is true and its reasoning holds; it has no mistakes."),
    Criterion("clarity", "The text is easy to follow: well ordered, precisely worded, without needless detours."),
    Criterion("completeness", "The text treats all that was asked, with the steps and details that are needed."),
    Criterion("relevance", "The text keeps to what was asked and holds nothing beside the point."),
    Criterion("depth", "The text explains why, gives reasons and examples, and teaches something not obvious."),
    Criterion("difficulty", "The text treats a demanding task that takes knowledge or several steps of thought."),
    Criterion("language", "The text is well written, without errors of grammar, broken formatting or leftovers."),
)
"""What is tried first, before the manager writes its own."""


@dataclass(frozen=True)
class MiningOptions:
    """How criteria are mined; the thresholds are shares of the workers' decided answers."""

    criteria: int = 6
    rounds: int = 3
    keep: float = 0.75
    ban: float = 0.5
    critiques: int = 4
    votes: int = 1
    reply_tokens: int = 64


@dataclass(frozen=True)
class Measured:
    """A criterion tried on the pairs: of `answers` for one side or the other, `right` are for the preferred one.

    `wrong` are the pairs with more answers for the other side. Answers of no opinion do not count.
    """

    criterion: Criterion
    right: int
    answers: int
    wrong: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """0 where a worker never has an opinion."""
        return self.right / self.answers if self.answers else 0.0


_JUDGE = (
    "Below are two texts, A and B. Judge by one criterion alone, and by nothing else.\n\n"
    "Criterion, {name}: {description}\n\nText A:\n{a}\n\nText B:\n{b}\n\nWhich of the two meets the criterion better? "
    "Reply with one letter and nothing else: A, B, or U if the criterion does not tell them apart."
)
_WRITE = (
    "Some people prefer one text to another. Find out by what: below are pairs of texts, the preferred one first.\n\n"
    "{examples}\n\nWrite {count} criteria by which the preferred texts are better than the others. Each must be judged "
    "from a text alone.{avoid}\n\nReply with one criterion a line and nothing else, in the form\n"
    "name: one sentence that says what makes a text better"
)
_CRITIQUE = (
    "By the criterion below, a judge preferred the wrong one of two texts.\n\nCriterion, {name}: {description}\n\n"
    "Text that should be preferred:\n{good}\n\nText that the judge preferred:\n{bad}\n\n"
    "Say in one or two sentences what in the criterion's wording led to this, and how to mend it."
)
_REWRITE = (
    "The criterion below sorts texts by quality, and is often wrong.\n\nCriterion, {name}: {description}\n\n"
    "What was said of its mistakes:\n{critiques}\n\nRewrite it so that it errs less. Reply with one line and nothing "
    "else, in the form\n{name}: one sentence that says what makes a text better"
)


def mine(
    texts: Texts,
    preferred: Sequence[bool],
    manager: Judge,
    workers: Judge,
    options: MiningOptions,
    rng: np.random.Generator,
) -> tuple[list[Measured], list[Mapping[str, Any]]]:
    """(the criteria that reach `keep`, each in its best version, best first; a log of every one tried).

    texts [m] pairs, preferred [m]: whether the first is. The known criteria better than chance come first, the manager
    writes the others after a look at some pairs. Every round tries all: from `keep` on one stays as it is, up to `ban`
    it goes back to its best version, or where that is no better it is banned and a new one takes its place; between,
    some of its wrong pairs are criticised and it is rewritten. Raises BadInput where none reaches `keep` in the end.
    """
    pairs = [(a, b) if first else (b, a) for (a, b), first in zip(texts, preferred, strict=True)]
    mining = _Mining(pairs, manager, workers, options, rng)
    active = mining.start()
    for number in range(1, options.rounds + 1):
        measured = [mining.measure(criterion, f"round {number}") for criterion in active]
        if number < options.rounds:
            active = mining.revise(measured)
    found = sorted(mining.best.values(), key=lambda one: -one.accuracy)
    kept = [one for one in found if one.accuracy >= options.keep]
    if not kept:
        best = f"{found[0].criterion.name!r} at {found[0].accuracy:.2f}" if found else "none could be tried"
        raise BadInput(
            f"no criterion agrees with the pairs at {options.keep:g} or more; the best is {best}",
            hint="take stronger judges or more rounds, lower keep, or see whether the preferences have a reason at all",
        )
    return kept, mining.log


def majority(judge: Judge, criteria: Sequence[Criterion], texts: Texts, votes: int, reply_tokens: int) -> NDArray[Any]:
    """float64 [m]: 1 where most criteria decide for the first text, 0 for the second, NaN where they are even."""
    balance = np.zeros(len(texts))
    for criterion in criteria:
        found = _votes(judge, criterion, texts, votes, reply_tokens)
        balance += np.sign(found.a - found.b)
    return np.where(balance == 0, np.nan, (balance > 0).astype(np.float64))


def read_criteria(reply: str) -> list[Criterion]:
    """`name: description` lines of a manager's reply; numbers, bullets and marks of emphasis are passed over."""
    found = []
    for line in reply.splitlines():
        match = _LINE.match(line)
        if match:
            name = " ".join(re.sub(r"[*_`\"]", "", match["name"]).lower().split())
            description = match["description"].strip(" *\"'")
            if name and len(description) >= 10:
                found.append(Criterion(name, description))
    return found


_LINE = re.compile(
    r"\s*(?:[-*•]\s+|\(?\d+[.)]\s*)?(?P<name>[*_`\"]*\w[\w \-/&*_`\"]{0,60}?)\s*:[*_`\"]*\s+(?P<description>\S.*)"
)


def _votes(judge: Judge, criterion: Criterion, texts: Texts, votes: int, reply_tokens: int) -> Votes:
    # The texts' places are still open: braces that a manager wrote must not become places too.
    described = criterion.description.replace("{", "(").replace("}", ")")
    template = _JUDGE.replace("{name}", criterion.name).replace("{description}", described)
    return ask_votes(judge, template, texts, votes=votes, choices="ABU", max_tokens=reply_tokens, title="judging pairs")


class _Mining:
    """The state of one mining: the best version of each criterion, the banned names, the log."""

    def __init__(
        self, pairs: Texts, manager: Judge, workers: Judge, options: MiningOptions, rng: np.random.Generator
    ) -> None:
        self.pairs, self.manager, self.workers, self.options, self.rng = pairs, manager, workers, options, rng
        self.best: dict[str, Measured] = {}
        self.banned: set[str] = set()
        self.log: list[Mapping[str, Any]] = []
        self._asked = 0

    def start(self) -> list[Criterion]:
        """The known criteria above chance, best first, and new ones up to the number wanted."""
        known = [self.measure(criterion, "start") for criterion in KNOWN]
        good = sorted((one for one in known if one.accuracy > 0.5), key=lambda one: -one.accuracy)
        active = [one.criterion for one in good[: self.options.criteria]]
        self.best = {criterion.name: self.best[criterion.name] for criterion in active}
        self.banned = {criterion.name for criterion in KNOWN} - set(self.best)
        return active + self.write(self.options.criteria - len(active), active)

    def measure(self, criterion: Criterion, when: str) -> Measured:
        """The pairs have their preferred text first, so that votes for a are right."""
        votes = _votes(self.workers, criterion, self.pairs, self.options.votes, self.options.reply_tokens)
        wrong = tuple(np.flatnonzero(votes.b > votes.a).tolist())
        found = Measured(criterion, int(votes.a.sum()), int((votes.a + votes.b).sum()), wrong)
        before = self.best.get(criterion.name)
        if before is None or found.accuracy > before.accuracy:
            self.best[criterion.name] = found
        figures = {"accuracy": round(found.accuracy, 3), "answers": found.answers, "no opinion": votes.undecided}
        self.log.append(
            {"step": when, "criterion": criterion.name, **figures, "unreadable": votes.unreadable}
            | {"description": criterion.description}
        )
        return found

    def revise(self, measured: Sequence[Measured]) -> list[Criterion]:
        """The criteria of the next round."""
        options = self.options
        following: list[Criterion] = []
        for one in measured:
            best = self.best[one.criterion.name]
            if one.accuracy >= options.keep:
                following.append(one.criterion)
            elif best.accuracy > options.ban:
                following.append(self.rewrite(one if one.accuracy > options.ban else best))
            else:
                self.banned.add(one.criterion.name)
        return following + self.write(len(measured) - len(following), following)

    def write(self, count: int, active: Sequence[Criterion]) -> list[Criterion]:
        """Up to `count` new criteria of the manager's; what it writes again under a known name is passed over."""
        written: list[Criterion] = []
        for _ in range(2):
            if len(written) >= count:
                break
            taken = {*self.banned, *self.best, *(one.name for one in (*active, *written))}
            avoid = f" Write none of these again: {', '.join(sorted(taken))}." if taken else ""
            question = _filled(_WRITE, examples=self._examples(), count=str(count - len(written)), avoid=avoid)
            for criterion in read_criteria(self._ask_manager([question], 512)[0]):
                if criterion.name not in taken and len(written) < count:
                    written.append(criterion)
                    taken.add(criterion.name)
        if len(written) < count:
            self.log.append({"step": "manager", "criteria wanted": count, "written": len(written)})
        return written

    def rewrite(self, one: Measured) -> Criterion:
        """The criterion in other words, after critiques of some of the pairs that it gets wrong."""
        about = {"name": one.criterion.name, "description": one.criterion.description}
        chosen = one.wrong[: self.options.critiques]
        questions = [_filled(_CRITIQUE, **about, good=self.pairs[i][0], bad=self.pairs[i][1]) for i in chosen]
        critiques = "\n".join(f"- {' '.join(reply.split())}" for reply in self._ask_manager(questions, 160))
        question = _filled(_REWRITE, **about, critiques=critiques or "- It leaves too many pairs undecided.")
        found = read_criteria(self._ask_manager([question], 256)[0])
        return Criterion(one.criterion.name, found[0].description) if found else one.criterion

    def _examples(self) -> str:
        chosen = self.rng.choice(len(self.pairs), size=min(4, len(self.pairs)), replace=False)
        return "\n\n".join(
            f"Preferred:\n{self.pairs[index][0]}\nNot preferred:\n{self.pairs[index][1]}" for index in chosen
        )

    def _ask_manager(self, questions: Sequence[str], tokens: int) -> list[str]:
        # A number of its own, so that the same words asked again may get another answer.
        asked = [Question(text, 1.0, tokens, self._asked + place) for place, text in enumerate(questions)]
        self._asked += len(questions)
        return self.manager.ask(asked, "asking the manager") if asked else []


def _filled(template: str, **texts: str) -> str:
    """The template with the texts in their places, in one pass: what stands in a text is never filled."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)
