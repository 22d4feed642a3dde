"""What the endpoints share: the current generation, admission, the speaker, and the way of a request through them."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from functools import partial
from typing import Any

from fastapi import Request, Response

from xpert.errors import BadInput, NotFound, XpertError
from xpert.experts.aggregated import check_one_stage
from xpert.experts.server.admission import Admission
from xpert.experts.server.body import read_json
from xpert.experts.server.calls import Call, Heard, Reply
from xpert.experts.server.errors import error_event
from xpert.experts.server.failures import Forbidden
from xpert.experts.server.generations import Generation, Generations
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.metrics import Moment, engine_figures
from xpert.experts.server.model_names import Asked, by_way, parse_model
from xpert.experts.server.openai_forms import experts_header
from xpert.experts.server.operation import Operation
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.pace import Pace
from xpert.experts.server.replies import Prompt, Speaker, Task
from xpert.experts.server.request_watch import facts_of
from xpert.experts.server.schema import ParameterError
from xpert.experts.server.streams import EventStream, merged, until_gone, with_first
from xpert.experts.server.token_texts import TokenTexts
from xpert.experts.server.tracing import http_attributes, route_attributes
from xpert.protocols import Constraint, Piece, RouteRequest, Sampling, TokenLogprob

__all__ = ["Events", "Pieces", "Service", "check_allowed", "check_many"]

Pieces = AsyncGenerator[tuple[int, Piece], None]
Events = Callable[[Call, Pieces], AsyncGenerator[str, None]]


class Service:
    """Made before the server starts; `start` and `stop` run on its event loop."""

    def __init__(self, generations: Generations, options: ServeOptions) -> None:
        self.generations = generations
        self.options = options
        self.started = time.time()
        self.admission = Admission(options.max_batch, options.max_queue)
        self.operation = Operation(options, generations, self.moment)
        lm = generations.lm
        # A tokenizer for the preparing thread alone, and one for the event loop: see Speaker.
        self.tokenizer = copy.deepcopy(lm.tokenizer)
        self.texts = TokenTexts(copy.deepcopy(lm.tokenizer))
        self.ends: frozenset[int] = lm.stop_ids
        self.requests = 0
        self.pace = Pace()
        self._calls: dict[str, Call] = {}
        self.speaker: Speaker

    def start(self) -> None:
        self.speaker = Speaker(self.generations.engine, self.tokenizer, max_batch=self.options.max_batch)

    def stop(self) -> None:
        """Blocks until the engine's thread has ended and the logs are written."""
        self.speaker.close()
        self.operation.close()

    async def read(self, request: Request) -> Any:
        """The decoded body."""
        return await read_json(request, most=self.options.max_body)

    # ── the way of a request ─────────────────────────────────────────────────────────────────────────────────────

    async def answer(
        self,
        request: Request,
        kind: str,
        model: str,
        places: int,
        *,
        prepare: Callable[[Call], Awaitable[None]],
        whole: Callable[[Call], Awaitable[Response]],
        events: Events | None = None,
    ) -> Response:
        """Admits a request, prepares it, and answers whole, or with `events` as a stream."""
        call = await self.open(request, kind, model, places)
        try:
            await until_gone(request, call, prepare(call))
            self.operation.let_in(call)
            if events is None:
                response = await until_gone(request, call, whole(call))
                response.headers.update(self.headers(call))
            else:
                # The first piece is awaited here, so that a request the engine refuses is answered by a status.
                pieces = self.pieces(call)
                # However it ends, the engine is told before the generation is let go.
                call.resources.push_async_callback(pieces.aclose)
                first = await until_gone(request, call, anext(pieces))
                return EventStream(
                    call,
                    events(call, with_first(first, pieces)),
                    headers=self.headers(call),
                    last_word=error_event,
                )
        except BaseException as error:
            call.failure = error
            await call.resources.aclose()
            raise
        await call.resources.aclose()
        return response

    async def open(self, request: Request, kind: str, model: str, places: int) -> Call:
        """Admits a request and gives it the current generation. Whoever ends it closes its resources. For embeddings
        (kind `embd`) the model is the embedder, which the caller has checked.

        Raises Busy where the queue is full, Unavailable once the server is ending, NotFound for an unknown model.
        """
        loop = asyncio.get_running_loop()
        resources = AsyncExitStack()
        stop: asyncio.Future[XpertError] = loop.create_future()
        holder = getattr(request.state, "holder", None)
        try:
            resources.enter_context(self.operation.draining.request(lambda error: _end(stop, error)))
            deadline = loop.time() + self.allowed(request)
            self.admission.enter(places)
            resources.callback(self.admission.leave, places)
            generation = resources.enter_context(self.generations.hold())
            id = f"{kind}-{uuid.uuid4().hex}"
            name = f"{request.method} {request.url.path}"
            about = {**http_attributes(request.method, request.url.path), "gen_ai.request.model": model}
            span = self.operation.tracing.request(name, request.scope["headers"], about)
            facts = facts_of(request.scope)
            call = Call(id, model, generation, deadline, resources, span, facts, stop, holder, places=places)
            self._calls[id] = call
            resources.callback(self._finish, call)
            facts.model = model
            if kind != "embd":
                asked = self.asked(model, generation)
                facts.model_kind = "mixture" if asked.experts is None else "expert" if asked.experts else "base"
            check_allowed(holder, model, generation)
        except BaseException:
            await resources.aclose()
            raise
        return call

    def _finish(self, call: Call) -> None:
        del self._calls[call.id]
        self.requests += 1
        self.operation.finish(call)

    def allowed(self, request: Request) -> float:
        """Seconds that the request may take: the server's, or fewer where the client says so."""
        asked = request.headers.get("x-xpert-timeout")
        if asked is None:
            return self.options.deadline
        try:
            seconds = float(asked)
        except ValueError:
            seconds = -1.0
        if not seconds > 0:
            raise ParameterError(f"x-xpert-timeout: {asked!r} is not a number of seconds above 0", None)
        return min(seconds, self.options.deadline)

    def asked(self, model: str, generation: Generation) -> Asked:
        """Raises NotFound or BadInput about the parameter `model`."""
        with _about_the_model():
            return parse_model(model, generation.mixture, overrides=self.options.overrides)

    def check_way(self, model: str) -> None:
        """Raises what `asked` does, and what is wrong with a way that the current generation has not yet ready."""
        generation = self.generations.current
        asked = self.asked(model, generation)
        with _about_the_model():
            by_way(generation.mixture, asked.way)

    async def route(self, id: str, model: str, generation: Generation, prompt: Prompt) -> Task:
        """A task with its route and nothing to generate yet."""
        asked = self.asked(model, generation)
        if asked.experts is not None:
            return Task(id, generation, prompt, generation.runner.known(asked.experts), False, Sampling())
        # A router that is made for this request takes its time, which the others must not wait for.
        routed = generation.kept(asked.way)
        if routed is None:
            with _about_the_model():
                routed = await asyncio.to_thread(generation.by, asked.way)
        found = await self.speaker.prepare(partial(routed.router.route, [RouteRequest(id, prompt.messages)]))
        return Task(id, generation, prompt, found[0], True, Sampling(), aggregator=routed.aggregator)

    async def tasks(
        self,
        call: Call,
        prompts: Sequence[Callable[[], Prompt]],
        sampling: Sampling,
        replies: int,
        *,
        constraint: Constraint | None = None,
        choices: tuple[str, ...] = (),
    ) -> None:
        """Routes and encodes the replies to each prompt, into `call.tasks`."""
        same = sampling.temperature == 0 and replies > 1
        call.copies = replies if same else 1
        for index, make in enumerate(prompts):
            with call.span.child("route") as span:
                prompt = await self.speaker.prepare(make)
                routed = await self.route(f"{call.id}-{index}", call.model, call.generation, prompt)
                if routed.aggregator is not None:
                    check_one_stage(routed.route)
                span.set(route_attributes(routed.route))
            if constraint is not None and routed.aggregator is not None:
                raise ParameterError(
                    "a constrained reply cannot be made of several", "response_format", hint="ask for one expert"
                )
            if sampling.logprobs is not None and routed.aggregator is not None:
                raise ParameterError("a reply made of several has no log-probabilities", "logprobs")
            for number in range(1 if same else replies):
                task = dataclasses.replace(
                    routed,
                    id=f"{call.id}-{index}-{number}",
                    sampling=_own_seed(sampling, number),
                    constraint=constraint,
                    choices=choices,
                    # Each reply has its own; `replace` would share them.
                    outcome=dataclasses.replace(routed.outcome),
                    timing=dataclasses.replace(routed.timing),
                )
                await self.speaker.prepare(partial(self.speaker.encode, task))
                call.tasks.append(task)
                call.heard.append(Heard())

    async def pieces(self, call: Call) -> Pieces:
        """(task's index, piece) of all tasks, as they come."""
        span = call.span.child("generate")
        try:
            async with aclosing(merged([self.speaker.pieces(task) for task in call.tasks])) as found:
                async for index, piece in found:
                    heard = call.heard[index]
                    before = heard.completion_tokens
                    heard.take(piece)
                    self.pace.add(heard.completion_tokens - before)
                    yield index, piece
        finally:
            span.end()

    async def replies(self, call: Call) -> list[Reply]:
        """The whole replies of all tasks, in order."""
        tokens: list[list[TokenLogprob]] = [[] for _ in call.tasks]
        last: dict[int, Piece] = {}
        async for index, piece in self.pieces(call):
            tokens[index] += piece.tokens
            last[index] = piece
        return [
            Reply(
                "".join(heard.texts),
                heard.finished or "stop",
                last[index].prompt_tokens,
                heard.completion_tokens,
                tuple(tokens[index]),
            )
            for index, heard in enumerate(call.heard)
        ]

    def headers(self, call: Call) -> dict[str, str]:
        """Of every answer: who gave it, and what is left of the key's limits."""
        return {
            "x-xpert-experts": "; ".join(dict.fromkeys(experts_header(task.outcome.experts) for task in call.tasks)),
            **self.operation.headers(call.holder),
        }

    # ── how things stand ─────────────────────────────────────────────────────────────────────────────────────────

    def moment(self) -> Moment:
        """How things stand, for /metrics."""
        running = self.speaker.loop.running
        return Moment(
            running=running,
            waiting=max(0, self.admission.used - running),
            generations=self.generations.alive,
            ready=self.ready,
            engine=engine_figures(self.generations.engine),
        )

    @property
    def ready(self) -> bool:
        return self.speaker.loop.alive and self.operation.draining.ready

    def load(self) -> dict[str, Any]:
        """How things stand, for /v1/load and the page. requests and tokens count from the start."""
        running = self.speaker.loop.running
        return {
            "running": running,
            "waiting": max(0, self.admission.used - running),
            "max_batch": self.admission.max_batch,
            "max_queue": self.admission.max_queue,
            "requests": self.requests,
            "tokens": self.pace.total,
            "tokens_per_second": round(self.pace.per_second(), 2),
            "experts": dict(Counter(key for call in self._calls.values() for key in call.experts)),
            "refused": self.admission.refused,
            "generations": self.generations.alive,
            "generation": self.generations.current.number,
            "started": self.started,
        }


@contextmanager
def _about_the_model() -> Iterator[None]:
    """Says of what is wrong inside that the parameter `model` is."""
    try:
        yield
    except BadInput as error:
        error.param = "model"  # type: ignore[attr-defined]  # read by the error form
        if isinstance(error, NotFound):
            error.code = "model_not_found"  # type: ignore[attr-defined]  # as above
        raise


def check_many(count: int, most: int, param: str) -> None:
    """Raises ParameterError where one request asks for more replies than the server gives to one."""
    if count > most:
        raise ParameterError(f"{count} replies are asked for at once; the most is {most}", param)


def check_allowed(holder: KeyHolder | None, model: str, generation: Generation) -> None:
    """Raises Forbidden for a model that is not among the key's. A way of the mixture is the mixture."""
    mixture = generation.mixture
    plain = mixture.name if model.startswith(f"{mixture.name}:") and model not in mixture.keys else model
    if holder is not None and not holder.allows(plain):
        allowed = ", ".join(holder.models or ())
        raise Forbidden(f"this key may not ask for {model!r}", hint=f"it may ask for {allowed}")


def _own_seed(sampling: Sampling, number: int) -> Sampling:
    """The first reply has the seed that was given; each of the others one of its own."""
    if sampling.seed is None or number == 0:
        return sampling
    return dataclasses.replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**63)


def _end(stop: asyncio.Future[XpertError], error: XpertError) -> None:
    if not stop.done():
        stop.set_result(error)
