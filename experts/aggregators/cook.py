"""CooK: experts write passages of knowledge, and one model answers with them before its eyes."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from xpert.config import Config, option
from xpert.errors import BadInput, unknown
from xpert.experts.aggregators._prompting import (
    cut_words,
    mean_logprob,
    says_yes,
    stated,
    with_last,
    without_thinking,
)
from xpert.experts.aggregators._voting import BASE, alone, members_of, only_reply, rounded, shares
from xpert.protocols import Answer, Ask, Embedder, Question, RoutableExpert, Verdict, Weigh, Weighed

__all__ = ["PLUGIN", "CookAggregator", "CookOptions"]

_FULL = "the context is full"

Steps = Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Any]


@dataclass(frozen=True)
class CookOptions(Config):
    mode: str = option(
        "bottom-up",
        "whether every expert writes first (bottom-up), or the answering model asks for what it lacks (top-down)",
        choices=("bottom-up", "top-down"),
    )
    expert: str = option(BASE, "who answers with the passages: `base` or an expert of the mixture")
    top: int = option(2, "bottom-up: how many passages are kept; top-down: how many are asked for at most", minimum=1)
    select: str = option(
        "both",
        "bottom-up: by what passages are kept: likeness to the question, to the other passages, or the sum",
        choices=("relevance", "agreement", "both"),
    )
    passage_tokens: int = option(96, "longest passage as it is written, in tokens", minimum=1)
    words: int = option(60, "longest passage as it is shown, in words; cut at the end of a sentence", minimum=1)
    embedder: str = option("lsa", "compares passages: lsa (fitted on the experts' exemplars), minilm or st:NAME")


@dataclass(frozen=True)
class _Passage:
    expert: str
    text: str
    relevance: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class CookAggregator:
    """Experts are knowledge cards: they write passages, which stand before the question when it is answered.

    bottom-up: every expert of the route writes a passage; those most like the question (relevance) and like the other
    passages (agreement, in the place of the paper's factuality, which needs a corpus to retrieve from) are kept, and
    cut to `words` (brevity, in the place of a summary model). top-down: the answering model is asked whether it needs
    more information; while Yes is likelier than No, the expert whose description it finds likeliest per token writes a
    passage. Where passages do not fit the context, the last ones are left out, or none is written, and the log says so.

    Cost: bottom-up a passage per expert of the route, and the answer; top-down up to `top` passages, each after two
    prompts that weigh words, and the answer. Source: Knowledge Card, https://arxiv.org/abs/2305.09955.
    """

    Options: ClassVar[type[Config]] = CookOptions
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "one passage per expert of the route (top-down: up to `top`, and likelihoods), and the answer"
    source: ClassVar[str] = "Knowledge Card (CooK), https://arxiv.org/abs/2305.09955"

    def __init__(self, options: CookOptions, *, seed: int = 0, device: str = "auto") -> None:
        from xpert.embedding import open_embedder

        self.options = options
        self._embedder: Embedder = open_embedder(options.embedder, device=device, seed=seed)
        self._descriptions: dict[str, str] = {}

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises NotFound for an answering expert that is not of the mixture, BadInput where nothing can be fitted."""
        keys = [expert.key for expert in experts]
        if self.options.expert not in (BASE, *keys):
            raise unknown("expert", self.options.expert, (BASE, *keys), where="aggregator cook")
        self._descriptions = {expert.key: _description(expert) for expert in experts}
        if self.options.mode == "bottom-up":
            ordered = sorted(experts, key=lambda expert: expert.key)
            texts = [text for expert in ordered for text in expert.exemplars if text.strip()]
            if not texts and self.options.embedder == "lsa":
                raise BadInput(
                    "aggregator cook compares passages by embedder lsa, and no expert has exemplars to fit it on",
                    hint="give embedder=minilm, or train experts with shots",
                )
            self._embedder.fit(texts)

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        if not members_of(question):
            reply = (yield [Ask(question.messages, alone(self.options.expert), question.sampling)])[0]
            assert isinstance(reply, Answer)
            return only_reply(question, reply, "the route names no expert: the answer without passages")
        gather = self._bottom_up if self.options.mode == "bottom-up" else self._top_down
        log: dict[str, Any] = {"mode": self.options.mode, "answered_by": self.options.expert}
        passages: list[_Passage] = yield from gather(question, log)
        reply, shown = yield from self._final(question, passages)
        log["used"] = [passage.expert for passage in passages[:shown]]
        used = passages[:shown]
        named = ", ".join(passage.expert for passage in used)
        reason = f"{self.options.expert} answered " + (f"with passages of {named}" if used else "without passages")
        reason += f"; {_FULL}" if "stopped" in log else ""
        if shown < len(passages):
            reason += f"; {len(passages) - shown} more did not fit the context"
        whose = shares(members_of(question), [passage.expert for passage in used])
        return Verdict(reply.text, whose, reason, reply.finished, log)

    def _bottom_up(self, question: Question, log: dict[str, Any]) -> Steps:
        keys = [key for key, _ in members_of(question)]
        try:
            found = yield [self._passage_ask(question, key) for key in keys]
        except BadInput:
            log["passages"], log["stopped"] = [], _FULL
            return []
        texts = [self._brief(reply) for reply in found]
        written = [_Passage(key, text) for key, text in zip(keys, texts, strict=True) if text]
        scored = self._compared(question, written)
        order = sorted(range(len(scored)), key=lambda place: (-self._score(scored[place]), place))
        log["passages"] = [scored[place].to_dict() for place in order]
        return [scored[place] for place in order[: self.options.top]]

    def _top_down(self, question: Question, log: dict[str, Any]) -> Steps:
        passages: list[_Passage] = []
        rounds: list[dict[str, Any]] = []
        log["rounds"], log["passages"] = rounds, []
        left = sorted(key for key, _ in members_of(question))
        model = alone(self.options.expert)
        while left and len(passages) < self.options.top:
            need = f"{_with_passages(question, passages)}\n\nDo you need more information? Answer Yes or No."
            try:
                asked = (yield [Weigh(with_last(question.messages, need), model, ("Yes", "No"))])[0]
                assert isinstance(asked, Weighed)
                margin = says_yes(asked)
                rounds.append({"needs_more": margin})
                if margin <= 0:
                    break
                listed = "\n".join(f"- {self._descriptions[key]}" for key in left)
                which = f"{_with_passages(question, passages)}\n\nWhich of these would help to answer?\n{listed}"
                names = tuple(self._descriptions[key] for key in left)
                weighed = (yield [Weigh(with_last(question.messages, which), model, names)])[0]
                assert isinstance(weighed, Weighed)
                likely = {key: round(mean_logprob(one), 5) for key, one in zip(left, weighed.logprobs, strict=True)}
                chosen = max(left, key=lambda key: likely[key])
                rounds[-1] |= {"likely": {key: rounded(value) for key, value in likely.items()}, "asked": chosen}
                left.remove(chosen)
                text = self._brief((yield [self._passage_ask(question, chosen)])[0])
            except BadInput:
                log["stopped"] = _FULL
                break
            if text:
                passages.append(_Passage(chosen, text))
                log["passages"].append(passages[-1].to_dict())
        return passages

    def _final(self, question: Question, passages: Sequence[_Passage]) -> Steps:
        """The answer, and with how many of the passages, the first ones, it was given."""
        for shown in range(len(passages), -1, -1):
            messages = with_last(question.messages, _with_passages(question, passages[:shown]))
            try:
                reply = (yield [Ask(messages, alone(self.options.expert), question.sampling)])[0]
            except BadInput:
                if not shown:
                    raise
                continue
            return reply, shown
        raise AssertionError("the last round returns or raises")

    def _passage_ask(self, question: Question, key: str) -> Ask:
        wanted = (
            f"Write a short passage of facts that help to answer the following. Do not answer it.\n\n{stated(question)}"
        )
        sampling = dataclasses.replace(question.sampling, max_tokens=self.options.passage_tokens)
        return Ask(with_last(question.messages, wanted), alone(key), sampling)

    def _brief(self, reply: Answer | Weighed) -> str:
        assert isinstance(reply, Answer)
        return cut_words(without_thinking(reply.text), self.options.words)

    def _compared(self, question: Question, passages: Sequence[_Passage]) -> list[_Passage]:
        """The passages with their cosines to the question, and their mean cosines to the other passages."""
        if not passages:
            return []
        vectors = self._embedder.embed([stated(question), *(passage.text for passage in passages)])
        cosines = np.round(vectors @ vectors.T, 5)
        compared = []
        for place, passage in enumerate(passages, 1):
            others = [float(cosines[place, other]) for other in range(1, len(vectors)) if other != place]
            agreement = sum(others) / len(others) if others else 0.0
            compared.append(
                dataclasses.replace(
                    passage, relevance=round(float(cosines[place, 0]), 5), agreement=round(agreement, 5)
                )
            )
        return compared

    def _score(self, passage: _Passage) -> float:
        relevance, agreement = passage.relevance or 0.0, passage.agreement or 0.0
        return {"relevance": relevance, "agreement": agreement, "both": relevance + agreement}[self.options.select]


def _with_passages(question: Question, passages: Sequence[_Passage]) -> str:
    if not passages:
        return stated(question)
    listed = "\n\n".join(passage.text for passage in passages)
    return f"Knowledge that may help:\n\n{listed}\n\nWith this in mind:\n\n{stated(question)}"


def _description(expert: RoutableExpert) -> str:
    """What an expert is for, in a line; of one that does not say, its skills or its key."""
    first = " ".join(expert.description.split())
    return first or ", ".join(expert.skills) or expert.key


PLUGIN = CookAggregator
