"""What the endpoints share: the current generation, admission, the speaker, and the way of a request through them."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request

from xpert.errors import NotFound
from xpert.experts.server.admission import Admission
from xpert.experts.server.failures import TooLarge
from xpert.experts.server.generations import Generation, Generations
from xpert.experts.server.model_names import Asked, Way, parse_model
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.replies import Prompt, Speaker, Task
from xpert.experts.server.schema import ParameterError
from xpert.experts.server.streams import merged
from xpert.experts.server.token_texts import TokenTexts
from xpert.protocols import Constraint, Piece, RouteRequest, Sampling, TokenLogprob

__all__ = ["Call", "Reply", "Service", "check_many", "read_json"]


@dataclass
class Reply:
    """One whole reply."""

    text: str
    finished: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass
class Call:
    """A request on its way: since when, until when, with which generation, and what it holds until its end."""

    id: str
    model: str
    generation: Generation
    deadline: float
    resources: AsyncExitStack
    begin: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    tasks: list[Task] = field(default_factory=list)
    copies: int = 1
    """How often each task's reply is given: greedy replies to one prompt are all the same, and computed once."""

    @property
    def first(self) -> Task:
        return self.tasks[0]


class Service:
    """Made before the server starts; `start` and `stop` run on its event loop."""

    def __init__(self, generations: Generations, options: ServeOptions) -> None:
        self.generations = generations
        self.options = options
        self.started = time.time()
        self.admission = Admission(options.max_batch, options.max_queue)
        lm = generations.lm
        # A tokenizer for the preparing thread alone, and one for the event loop: see Speaker.
        self.tokenizer = copy.deepcopy(lm.tokenizer)
        self.texts = TokenTexts(copy.deepcopy(lm.tokenizer))
        self.ends: frozenset[int] = lm.stop_ids
        self.requests: Counter[str] = Counter()
        self.speaker: Speaker

    def start(self) -> None:
        self.speaker = Speaker(self.generations.engine, self.tokenizer, max_batch=self.options.max_batch)

    def stop(self) -> None:
        """Blocks until the engine's thread has ended."""
        self.speaker.close()

    # ── the way of a request ─────────────────────────────────────────────────────────────────────────────────────

    async def open(self, request: Request, kind: str, model: str, places: int) -> Call:
        """Admits a request and gives it the current generation. The caller closes `resources`, or hands them on.

        Raises Busy where the queue is full, NotFound for an unknown model.
        """
        resources = AsyncExitStack()
        try:
            self.admission.enter(places)
            resources.callback(self.admission.leave, places)
            generation = resources.enter_context(self.generations.hold())
        except BaseException:
            await resources.aclose()
            raise
        deadline = asyncio.get_running_loop().time() + self._allowed(request)
        return Call(f"{kind}-{uuid.uuid4().hex}", model, generation, deadline, resources)

    def _allowed(self, request: Request) -> float:
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
        try:
            return parse_model(model, generation.mixture, overrides=self.options.overrides)
        except NotFound as error:
            error.param, error.code = "model", "model_not_found"  # type: ignore[attr-defined]  # read by the error form
            raise

    async def route(self, call: Call, prompt: Prompt) -> Task:
        """A task with its route and nothing to generate yet."""
        asked = self.asked(call.model, call.generation)
        generation = call.generation
        if asked.experts is not None:
            route = generation.runner.known(asked.experts)
            return Task(call.id, generation, prompt, route, False, Sampling())
        # A router that is made for this request takes its time, which the others must not wait for.
        routed = generation.routed if asked.way == Way() else await asyncio.to_thread(generation.by, asked.way)
        found = await self.speaker.prepare(partial(routed.router.route, [RouteRequest(call.id, prompt.messages)]))
        return Task(call.id, generation, prompt, found[0], True, Sampling(), aggregator=routed.aggregator)

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
            routed = await self.route(call, await self.speaker.prepare(make))
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
                )
                await self.speaker.prepare(partial(self.speaker.encode, task))
                call.tasks.append(task)

    def pieces(self, call: Call) -> AsyncIterator[tuple[int, Piece]]:
        """(task's index, piece) of all tasks, as they come."""
        return merged([self.speaker.pieces(task) for task in call.tasks])

    async def replies(self, call: Call) -> list[Reply]:
        """The whole replies of all tasks, in order."""
        texts: list[list[str]] = [[] for _ in call.tasks]
        tokens: list[list[TokenLogprob]] = [[] for _ in call.tasks]
        last: dict[int, Piece] = {}
        async for index, piece in self.pieces(call):
            texts[index].append(piece.text)
            tokens[index] += piece.tokens
            last[index] = piece
        return [
            Reply(
                "".join(texts[index]),
                last[index].finished or "stop",
                last[index].prompt_tokens,
                last[index].completion_tokens,
                tuple(tokens[index]),
            )
            for index in range(len(call.tasks))
        ]

    def load(self) -> dict[str, Any]:
        """What the server is doing now."""
        loop, admission = self.speaker.loop, self.admission
        return {
            "running": loop.running,
            "waiting": max(0, admission.used - loop.running),
            "max_batch": admission.max_batch,
            "max_queue": admission.max_queue,
            "refused": admission.refused,
            "generations": self.generations.alive,
            "generation": self.generations.current.number,
            "started": int(self.started),
        }


async def read_json(request: Request, most: int) -> Any:
    """The decoded body. Raises TooLarge beyond `most` bytes, ParameterError for what is no JSON."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise TooLarge(f"the body has {int(declared):,} bytes; the most is {most:,}")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise TooLarge(f"the body is larger than {most:,} bytes")
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ParameterError(f"the body is not valid JSON: {error}", None) from None


def _own_seed(sampling: Sampling, number: int) -> Sampling:
    """The first reply has the seed that was given; each of the others one of its own."""
    if sampling.seed is None or number == 0:
        return sampling
    return dataclasses.replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**63)


def check_many(count: int, most: int, param: str) -> None:
    """Raises BadInput where one request asks for more replies than the server gives to one."""
    if count > most:
        raise ParameterError(f"{count} replies are asked for at once; the most is {most}", param)
