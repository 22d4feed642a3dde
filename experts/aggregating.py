"""Running aggregators: the steps of many questions share the engine's batches.

A server that has a batch of its own drives one question: it makes a `Dialogue`, puts the requests of each step where it
likes, and resumes the dialogue with what came of them, until there is a verdict.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.protocols import (
    Aggregator,
    Answer,
    Ask,
    Engine,
    EngineRequest,
    Piece,
    Question,
    Sampling,
    TokenLogprob,
    Verdict,
    Weigh,
    Weighed,
    WeightedExperts,
)
from xpert.records import Message

__all__ = [
    "Dialogue",
    "Encoding",
    "Step",
    "aggregate",
    "answers_of",
    "ask_seed",
    "by_expert",
    "engine_requests",
    "model_encoding",
]

LEAST_ROOM = 32
"""Tokens of context that a prompt of an aggregator's own must leave, if the reply may be as long."""
_AT_ONCE = 128
"""Questions in lockstep: enough to fill batches, and what an interrupted run may lose."""
_WEIGHED_AT_ONCE = 256


@dataclass(frozen=True)
class Encoding:
    """How a model is asked: texts as token ids.

    prompt: messages -> the ids an answer is generated from. continuation: a text -> its ids behind a prompt, without
    the end of turn. context: tokens of prompt and reply together. keys: mixture key -> the engine's, where they differ.
    """

    prompt: Callable[[Sequence[Message]], tuple[int, ...]]
    continuation: Callable[[str], tuple[int, ...]]
    context: int
    keys: Mapping[str, str] = field(default_factory=dict)

    def experts(self, experts: WeightedExperts) -> WeightedExperts:
        """The experts under the engine's keys."""
        return tuple((self.keys.get(key, key), weight) for key, weight in experts)


def model_encoding(tokenizer: Any, context: int, keys: Mapping[str, str] | None = None) -> Encoding:
    """The chat form of a base model: what it is trained and asked in."""
    from xpert.chat_form import answer_ids, encode_prompt, end_of_turn

    end = len(end_of_turn(tokenizer))

    def continuation(text: str) -> tuple[int, ...]:
        ids = answer_ids(tokenizer, [text])[0]
        return ids[: len(ids) - end] if text else ()

    return Encoding(lambda messages: encode_prompt(tokenizer, messages), continuation, context, keys or {})


@dataclass(frozen=True)
class Step:
    """What an engine is asked in one step of a question: replies, and likelihoods of one continuation per request."""

    generations: tuple[EngineRequest, ...] = ()
    weighings: tuple[EngineRequest, ...] = ()
    continuations: tuple[tuple[int, ...], ...] = ()


def ask_seed(seed: int | None, question_id: str, number: int) -> int | None:
    """The seed of a question's ask `number`: its own, whatever else is in the batch. None stays None."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}\0{question_id}\0{number}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def engine_requests(
    wanted: Ask | Weigh, id: str, encoding: Encoding, *, seed: int | None = None, least_room: int = 1
) -> Step:
    """One ask, or one weighing with a request per continuation that is not empty, as an engine takes them.

    Requests are called `id`, or `id/i` for continuation i. Raises BadInput where the prompt leaves less than
    `least_room` tokens (or all that may be replied, if that is less) of the context.
    """
    ids = encoding.prompt(wanted.messages)
    room = encoding.context - len(ids)
    experts = encoding.experts(wanted.experts)
    if isinstance(wanted, Ask):
        _check_room(ids, room, min(least_room, wanted.sampling.max_tokens), encoding.context)
        longest = min(wanted.sampling.max_tokens, room)
        sampling = dataclasses.replace(wanted.sampling, max_tokens=longest, seed=seed)
        return Step((EngineRequest(id, ids, experts, sampling),))
    _check_room(ids, room, 1, encoding.context)
    texts = {index: encoding.continuation(text)[:room] for index, text in enumerate(wanted.continuations)}
    kept = {index: text for index, text in texts.items() if text}
    requests = tuple(EngineRequest(f"{id}/{index}", ids, experts, Sampling()) for index in kept)
    return Step((), requests, tuple(kept.values()))


def _check_room(ids: Sequence[int], room: int, least: int, context: int) -> None:
    if room < least:
        raise BadInput(
            f"the prompt has {len(ids):,} tokens, and the base model's context holds {context:,}"
            + (f", {least} of them for the reply" if least > 1 else ""),
            hint="shorten it",
        )


class Dialogue:
    """One question between its aggregator and an engine.

    `step` is what is asked now, and `verdict` None, until `resume` brings the verdict. The totals are of all replies so
    far. `where` is how the user knows the question.
    """

    def __init__(
        self, id: str, aggregator: Aggregator, question: Question, encoding: Encoding, *, where: str | None = None
    ) -> None:
        self.id = id
        self.question = question
        self.verdict: Verdict | None = None
        self.step = Step()
        self.replies = self.prompt_tokens = self.completion_tokens = 0
        self._encoding = encoding
        self._where = where
        self._asked: Sequence[Ask | Weigh] = ()
        self._number = 0
        self._steps: Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict] = aggregator.answer(question)
        self._advance(partial(next, self._steps))

    def resume(self, answers: Mapping[str, Answer], logprobs: Mapping[str, Sequence[float]]) -> None:
        """Goes on with what came of the step: answers and log-probabilities by the ids of its requests."""
        results: list[Answer | Weighed] = []
        for offset, wanted in enumerate(self._asked):
            id = f"{self.id}.{self._number + offset}"
            if isinstance(wanted, Ask):
                results.append(answers[id])
                self.replies += 1
                self.prompt_tokens += answers[id].prompt_tokens
                self.completion_tokens += answers[id].completion_tokens
            else:
                found = [tuple(logprobs.get(f"{id}/{index}", ())) for index in range(len(wanted.continuations))]
                results.append(Weighed(tuple(found)))
        self._number += len(self._asked)
        self._advance(partial(self._steps.send, results))

    def _advance(self, move: Callable[[], Sequence[Ask | Weigh]]) -> None:
        """To the next step that asks the engine for something, or to the verdict."""
        while True:
            try:
                self._asked = list(move())
                self.step = self._encoded()
            except StopIteration as ended:
                self._asked, self.step, self.verdict = (), Step(), ended.value
                return
            except _NoRoom as error:
                move = partial(self._steps.throw, error.cause)
                continue
            except BadInput as error:
                error.where = error.where or self._where
                raise
            if self.step != Step():
                return
            # Nothing but empty continuations, or nothing at all: there is nothing to wait for.
            nothing = [Weighed(((),) * len(one.continuations)) for one in self._asked if isinstance(one, Weigh)]
            self._number += len(self._asked)
            move = partial(self._steps.send, nothing)

    def _encoded(self) -> Step:
        parts = []
        for offset, wanted in enumerate(self._asked):
            number = self._number + offset
            seed = ask_seed(wanted.sampling.seed, self.question.id, number) if isinstance(wanted, Ask) else None
            least = 1 if wanted.messages == self.question.messages else LEAST_ROOM
            try:
                parts.append(
                    engine_requests(wanted, f"{self.id}.{number}", self._encoding, seed=seed, least_room=least)
                )
            except BadInput as error:
                raise _NoRoom(error) from None
        return Step(
            tuple(request for part in parts for request in part.generations),
            tuple(request for part in parts for request in part.weighings),
            tuple(ids for part in parts for ids in part.continuations),
        )


class _NoRoom(Exception):
    """A step could not be encoded; kept apart from what the aggregator itself raises."""

    def __init__(self, cause: BadInput) -> None:
        self.cause = cause
        super().__init__(str(cause))


def aggregate(
    engine: Engine,
    encoding: Encoding,
    aggregator: Aggregator,
    questions: Sequence[Question],
    *,
    finished: Callable[[int, Dialogue], None] | None = None,
    at_once: int = _AT_ONCE,
    where: Callable[[Question], str] = lambda question: f"prompt {question.id}",
    progress: Progress = SILENT,
) -> list[Dialogue]:
    """All questions to their verdicts, in order, in lockstep: `at_once` of them are open at a time.

    In each step all requests of one expert go to the engine together, the most wanted expert first, so that an expert
    is loaded once a step (query-level batches, Symbolic-MoE, https://arxiv.org/abs/2503.05641). Verdicts do not depend
    on what else is asked, but for the rounding of differently shaped products. `finished(index, dialogue)` hears of
    each verdict. Cost: as the aggregator says, for every question.
    """
    dialogues: list[Dialogue] = []
    with progress.task("answering", len(questions)) as task:
        for start in range(0, len(questions), at_once):
            part = questions[start : start + at_once]
            made = [
                Dialogue(str(start + index), aggregator, question, encoding, where=where(question))
                for index, question in enumerate(part)
            ]
            dialogues += made
            waiting = made
            while waiting:
                ended = [dialogue for dialogue in waiting if dialogue.verdict is not None]
                for dialogue in ended:
                    if finished is not None:
                        finished(int(dialogue.id), dialogue)
                    task.advance()
                waiting = [dialogue for dialogue in waiting if dialogue.verdict is None]
                _run_step(engine, waiting)
    return dialogues


def _run_step(engine: Engine, waiting: Sequence[Dialogue]) -> None:
    generations = by_expert([request for dialogue in waiting for request in dialogue.step.generations])
    answers = answers_of(engine.generate(generations)) if generations else {}
    pairs = [
        pair for dialogue in waiting for pair in zip(dialogue.step.weighings, dialogue.step.continuations, strict=True)
    ]
    continuations = {request.id: ids for request, ids in pairs}
    weighings = by_expert([request for request, _ in pairs])
    logprobs: dict[str, Sequence[float]] = {}
    for start in range(0, len(weighings), _WEIGHED_AT_ONCE):
        part = weighings[start : start + _WEIGHED_AT_ONCE]
        found = engine.continuation_logprobs(part, [continuations[request.id] for request in part])
        logprobs |= {request.id: one for request, one in zip(part, found, strict=True)}
    for dialogue in waiting:
        dialogue.resume(answers, logprobs)


def by_expert(requests: Sequence[EngineRequest]) -> list[EngineRequest]:
    """The requests of one expert (or one set) next to each other, the longest queue first; else in their order."""
    queue = Counter(request.experts for request in requests)
    return sorted(requests, key=lambda request: (-queue[request.experts], request.experts))


def answers_of(pieces: Iterable[Piece]) -> dict[str, Answer]:
    """Request id -> its whole reply."""
    texts: dict[str, list[str]] = {}
    tokens: dict[str, list[TokenLogprob]] = {}
    answers: dict[str, Answer] = {}
    for piece in pieces:
        texts.setdefault(piece.request_id, []).append(piece.text)
        tokens.setdefault(piece.request_id, []).extend(piece.tokens)
        if piece.finished is not None:
            answers[piece.request_id] = Answer(
                "".join(texts.pop(piece.request_id)),
                piece.finished,
                piece.prompt_tokens,
                piece.completion_tokens,
                tuple(tokens.pop(piece.request_id)),
            )
    return answers
