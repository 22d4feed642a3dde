"""One reply of the server: from a routed request to its pieces, whatever stages it takes.

plain        the route's experts answer, their pieces go out as they come
escalated    the first answer is whole before it is known whether the second stage answers anew
aggregated   the aggregator's steps run in the server's batch; its verdict is one piece
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from xpert.chat_form import encode_prompt
from xpert.experts.aggregating import Dialogue, answers_of, model_encoding
from xpert.experts.server.batcher import Batcher
from xpert.experts.server.engine_loop import Delivery, EngineLoop, Sink
from xpert.experts.server.generations import Generation
from xpert.protocols import (
    Aggregator,
    Constraint,
    EngineRequest,
    Piece,
    Question,
    Route,
    RouteRequest,
    Sampling,
    TokenLogprob,
    WeightedExperts,
)
from xpert.records import Message
from xpert.storage import hash_json

__all__ = ["Outcome", "Prompt", "Speaker", "Task", "Timing"]

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What is answered: chat messages, or (ids given) a text to go on with. `text` is what a router reads."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        return RouteRequest("", self.messages).prompt


@dataclass
class Outcome:
    """What is known once a reply has begun: who answers, and why. `log` is an aggregator's."""

    experts: WeightedExperts
    reason: str
    confidence: float | None = None
    stage: int = 1
    log: dict[str, Any] | None = None


@dataclass
class Timing:
    """When a reply was handed to the engine, when the step began that said its first text, when it said first and last;
    `time.monotonic` each."""

    submitted: float = 0.0
    began: float | None = None
    first: float | None = None
    last: float | None = None


@dataclass
class Task:
    """One reply to be made. `outcome` is right once the first piece has come."""

    id: str
    generation: Generation
    prompt: Prompt
    route: Route
    routed: bool
    sampling: Sampling
    aggregator: Aggregator | None = None
    constraint: Constraint | None = None
    choices: tuple[str, ...] = ()
    request: EngineRequest | None = None
    outcome: Outcome = field(default_factory=lambda: Outcome((), ""))
    timing: Timing = field(default_factory=Timing)

    @property
    def answered(self) -> Route:
        """The route as it was taken: with the experts of its second stage where these answered. Its chance was of the
        first answer, and says nothing of theirs."""
        if self.outcome.stage == 1:
            return self.route
        return dataclasses.replace(self.route, experts=self.outcome.experts, reason=self.outcome.reason, chance=None)


class Speaker:
    """Runs tasks on the engine. Routing and encoding take turns on one thread, `prepare`, with the tokenizer that the
    speaker is given for it: a fast tokenizer that two threads use at once raises "Already borrowed"."""

    def __init__(self, engine: Any, tokenizer: Any, *, max_batch: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        events = asyncio.get_running_loop()

        def deliver(said: Delivery) -> None:
            events.call_soon_threadsafe(self._hear, said)

        self._step_began = 0.0
        self.loop = EngineLoop(engine, deliver)
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="xpert-route")
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="xpert-score")
        self._weighing = Batcher(self._weigh_all, self._scorer, max_batch)
        self._telling = Batcher(self._tell_all, self._scorer, max_batch)
        self._embedding = Batcher(self._embed_all, self._scorer, max_batch)

    def close(self) -> None:
        """Blocks until the threads have ended; what still runs fails as Unavailable."""
        self._preparer.shutdown()
        self.loop.close()
        self._scorer.shutdown(cancel_futures=True)

    async def prepare(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparer, work)

    async def score(self, work: Callable[[], T]) -> T:
        """Beside the engine's steps, one work at a time: a model's tokenizer may not be used by two threads at once."""
        return await asyncio.get_running_loop().run_in_executor(self._scorer, work)

    def _hear(self, said: Delivery) -> None:
        self._step_began = said.began
        for sink, item in said.heard:
            sink(item)

    # ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, task: Task) -> None:
        """Makes the engine's request of a task, so that what is wrong with its prompt is said before it is answered.

        Belongs on the preparing thread. Raises BadInput for a prompt that leaves no room.
        """
        sampling = task.sampling
        if task.route.escalation is not None and sampling.logprobs is None:
            sampling = dataclasses.replace(sampling, logprobs=0)
        task.request = self._request(task, task.id, task.prompt, task.route.experts, sampling)
        task.outcome = Outcome(task.route.experts, task.route.reason)

    async def pieces(self, task: Task) -> AsyncGenerator[Piece, None]:
        """The pieces of an encoded task. Left before its end, it gives up its places in the batch."""
        timing = task.timing
        timing.submitted = time.monotonic()
        async with aclosing(self._stages(task)) as pieces:
            async for piece in pieces:
                timing.last = time.monotonic()
                if timing.first is None:
                    timing.first, timing.began = timing.last, self._step_began
                yield piece

    def _stages(self, task: Task) -> AsyncGenerator[Piece, None]:
        if task.aggregator is not None and task.routed:
            return self._aggregated(task)
        if task.route.escalation is not None:
            return self._escalated(task)
        assert task.request is not None
        return self._spoken(task.request)

    async def _spoken(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        if request.constraint is None:
            self.loop.submit(request, arrived.put_nowait)
        else:  # its grammar may take a while to compile
            await self._submitted(request, arrived.put_nowait)
        finished = False
        try:
            while not finished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                while item.finished is None and not arrived.empty():
                    later = arrived.get_nowait()
                    if isinstance(later, Exception):
                        finished = True
                        raise later
                    item = _joined(item, later)
                finished = item.finished is not None
                yield item
        finally:
            if not finished:
                self.loop.cancel(request.id)

    async def _submitted(self, request: EngineRequest, sink: Sink) -> None:
        """Submits on another thread, which cannot be stopped: whoever leaves meanwhile has it cancelled after."""
        submitting = asyncio.ensure_future(asyncio.to_thread(self.loop.submit, request, sink))

        def leave(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.loop.cancel(request.id)

        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(leave)
            raise

    async def _escalated(self, task: Task) -> AsyncGenerator[Piece, None]:
        assert task.request is not None and task.route.escalation is not None
        second = task.route.escalation
        whole = [piece async for piece in self._spoken(task.request)]
        tokens = [told.logprob for piece in whole for told in piece.tokens]
        confidence = math.exp(math.fsum(tokens) / len(tokens)) if tokens else 0.0
        task.outcome.confidence = confidence
        if confidence >= second.below:
            task.outcome.reason += f"; its answer's confidence {confidence:.2f} reaches {second.below:.2f}"
            for piece in whole:
                yield piece if task.sampling.logprobs is not None else dataclasses.replace(piece, tokens=())
            return
        task.outcome.experts, task.outcome.stage = second.experts, 2
        named = " + ".join(key for key, _ in second.experts) or "the base model"
        task.outcome.reason += (
            f"; its answer's confidence {confidence:.2f} is under {second.below:.2f}: {named} answers"
        )
        work = partial(self._request, task, f"{task.id}-2", task.prompt, second.experts, task.sampling)
        spent = whole[-1]
        async with aclosing(self._spoken(await self.prepare(work))) as pieces:
            async for piece in pieces:
                if piece.finished is not None:  # both answers were computed, and count
                    tokens_made = piece.completion_tokens + spent.completion_tokens
                    piece = dataclasses.replace(piece, completion_tokens=tokens_made)
                yield piece

    async def _aggregated(self, task: Task) -> AsyncGenerator[Piece, None]:
        """The steps of the task's aggregator: all requests of a step at once, in the batch that runs."""
        # Named by what is asked, so that the same request with the same seed is answered in the same way.
        asked = hash_json([[message.role, message.content] for message in task.prompt.messages])
        question = Question(asked, task.prompt.messages, task.route, task.sampling, task.choices)
        dialogue = await self.prepare(partial(self._dialogue, task, question))
        while dialogue.verdict is None:
            step = dialogue.step
            pairs = list(zip(step.weighings, step.continuations, strict=True))
            waits = [self._whole(request) for request in step.generations]
            found = await _all([*waits, *(self._weighing(pair) for pair in pairs)])
            answers = answers_of(piece for pieces in found[: len(waits)] for piece in pieces)
            logprobs = {pair[0].id: one for pair, one in zip(pairs, found[len(waits) :], strict=True)}
            await self.prepare(partial(dialogue.resume, answers, logprobs))
        verdict = dialogue.verdict
        task.outcome = Outcome(
            verdict.experts, f"{task.route.reason}; {verdict.reason}", log={**verdict.log, "reason": verdict.reason}
        )
        yield Piece(task.id, verdict.text, verdict.finished, dialogue.prompt_tokens, dialogue.completion_tokens)

    def _dialogue(self, task: Task, question: Question) -> Dialogue:
        assert task.aggregator is not None
        encoding = model_encoding(self.tokenizer, self.engine.context, task.generation.runner.keys)
        return Dialogue(task.id, task.aggregator, question, encoding)

    async def _whole(self, request: EngineRequest) -> list[Piece]:
        return [piece async for piece in self._spoken(request)]

    def _request(
        self, task: Task, id: str, prompt: Prompt, experts: WeightedExperts, sampling: Sampling
    ) -> EngineRequest:
        runner = task.generation.runner
        ids = prompt.ids if prompt.ids is not None else encode_prompt(self.tokenizer, prompt.messages)
        gated = task.routed and task.aggregator is None
        return runner.request_of_ids(
            id, ids, prompt.text, experts, sampling, gated=gated, constraint=task.constraint, where=None
        )

    # ── likelihoods and vectors ──────────────────────────────────────────────────────────────────────────────────

    async def prompt_logprobs(self, request: EngineRequest, alternatives: int) -> list[TokenLogprob]:
        """Of every token of the prompt but the first."""
        return await self._telling((request, alternatives))

    async def embed(self, ids: tuple[int, ...]) -> Any:
        """float32 [d] of length 1, by the base model's states."""
        return await self._embedding(ids)

    def _weigh_all(self, pairs: Sequence[tuple[EngineRequest, tuple[int, ...]]]) -> Sequence[list[float]]:
        found: list[list[float]] = self.engine.continuation_logprobs(
            [request for request, _ in pairs], [ids for _, ids in pairs]
        )
        return found

    def _tell_all(self, asked: Sequence[tuple[EngineRequest, int]]) -> Sequence[list[TokenLogprob]]:
        most = max(count for _, count in asked)
        found: list[list[TokenLogprob]] = self.engine.prompt_logprobs([request for request, _ in asked], most)
        return [
            [dataclasses.replace(told, alternatives=told.alternatives[:count]) for told in tokens]
            for tokens, (_, count) in zip(found, asked, strict=True)
        ]

    def _embed_all(self, prompts: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        return list(self.engine.embed(prompts))


async def _all(waits: Sequence[Any]) -> list[Any]:
    """Results in order. Where one fails the others are cancelled, so that they give up their places."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for one in tasks:
            one.cancel()


def _joined(first: Piece, second: Piece) -> Piece:
    return dataclasses.replace(second, text=first.text + second.text, tokens=first.tokens + second.tokens)
