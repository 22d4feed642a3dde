"""Choice shuffling: the question is asked with its options in several orders, and the answers vote."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.aggregators._answers import lettered_choices, option_lines, reader
from xpert.experts.aggregators._prompting import stated, with_last
from xpert.experts.aggregators._voting import Ballot, members_of, only_reply, vote
from xpert.experts.metrics import normalise
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["PLUGIN", "ChoiceShuffleAggregator", "ChoiceShuffleOptions"]

_FEW = 5
"""Options up to which all orders are listed to draw from."""
_MOST = 26
"""Options, since each needs a letter."""


@dataclass(frozen=True)
class ChoiceShuffleOptions(Config):
    orders: int = option(5, "in how many different orders the options are shown; no more than there are", minimum=1)


class ChoiceShuffleAggregator:
    """The route's experts, weighted as one, answer with the options in several orders; the options they mean vote.

    Options are the lettered lines of the prompt, or the question's choices, which are then written under it. Letters
    are mapped back to the original order. A reply that names no option counts for nothing. A question without options
    (or with more than there are letters), one behind which they do not fit the context, and one to which no reply names
    any, gets a single answer in the usual way, and the reason says so.

    Cost: `orders` replies. Source: the choice shuffling ensemble of Medprompt, https://arxiv.org/abs/2311.16452.
    """

    Options: ClassVar[type[Config]] = ChoiceShuffleOptions
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "`orders` replies"
    source: ClassVar[str] = "Medprompt, https://arxiv.org/abs/2311.16452"

    def __init__(self, options: ChoiceShuffleOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        self.seed = seed

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        members = members_of(question)
        usual = Ask(question.messages, members, question.sampling)
        texts, lettered = _options_of(question)
        if not 2 <= len(texts) <= _MOST:
            single = (yield [usual])[0]
            assert isinstance(single, Answer)
            return only_reply(question, single, "the question has no options to shuffle: a single answer")
        orders = _orders(len(texts), self.options.orders, f"{self.seed}\0{question.id}")
        shown = [_shown(question, [texts[place] for place in order]) for order in orders]
        try:
            found = yield [Ask(one.messages, members, question.sampling) for one in shown]
        except BadInput:
            single = (yield [usual])[0]
            assert isinstance(single, Answer)
            return only_reply(question, single, "the options do not fit the context: a single answer, unshuffled")
        replies = [reply for reply in found if isinstance(reply, Answer)]
        ballots = []
        for order, one, reply in zip(orders, shown, replies, strict=True):
            letter = reader("choice", one, [reply.text])(reply.text)
            text = _said(reply.text, order[_place(letter)], texts, lettered) if letter else ""
            note = {"order": [_letter(place) for place in order], "said": reply.text}
            ballots.append(Ballot(members, dataclasses.replace(reply, text=text), note=note))
        original = dataclasses.replace(question, choices=texts)
        if not any(ballot.reply.text for ballot in ballots):
            single = (yield [usual])[0]
            assert isinstance(single, Answer)
            return only_reply(question, single, "no reply named an option: a single answer, unshuffled")
        return vote(ballots, original, "choice", counted="orders of the options")


def _options_of(question: Question) -> tuple[tuple[str, ...], bool]:
    """The options' texts in their original order, and whether they stand in the prompt with letters."""
    lines = lettered_choices(stated(question))
    if lines and len(question.choices) in (0, len(lines)):
        return lines, True
    return question.choices, False


def _shown(question: Question, texts: Sequence[str]) -> Question:
    """The question with its options in another order; they bear the letters of their new places."""
    prompt = stated(question)
    lines = option_lines(prompt)
    if len(lines) == len(texts):
        for match, text in reversed(list(zip(lines, texts, strict=True))):
            prompt = prompt[: match.start(3)] + text + prompt[match.end(3) :]
    else:
        listed = "\n".join(f"{_letter(place)}. {text}" for place, text in enumerate(texts))
        prompt = f"{prompt}\n\n{listed}\n\nAnswer with the letter of one option."
    return dataclasses.replace(question, messages=with_last(question.messages, prompt), choices=tuple(texts))


def _said(reply: str, place: int, texts: Sequence[str], lettered: bool) -> str:
    """An option in the form of the reply that meant it: its letter, its text, or both; without letters, its text."""
    if not lettered or normalise(reply) in (normalise(text) for text in texts):
        return texts[place]
    return _letter(place) if len(normalise(reply)) == 1 else f"{_letter(place)}. {texts[place]}"


def _orders(count: int, wanted: int, seed: str) -> list[tuple[int, ...]]:
    """Different orders of `count` places, drawn by the hash of `seed`."""
    digest = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()
    drawn = random.Random(int.from_bytes(digest[:8], "big"))
    if count <= _FEW:
        every = list(itertools.permutations(range(count)))
        return drawn.sample(every, min(wanted, len(every)))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < min(wanted, math.factorial(count)):
        found.setdefault(tuple(drawn.sample(range(count), count)))
    return list(found)


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _place(letter: str) -> int:
    return ord(letter) - ord("A")


PLUGIN = ChoiceShuffleAggregator
