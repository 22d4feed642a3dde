"""A request on its way through the server, from its arrival to the last byte of its reply."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from xpert.errors import XpertError
from xpert.experts.server.generations import Generation
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.limits import Admission
from xpert.experts.server.replies import Task
from xpert.experts.server.request_watch import Facts
from xpert.experts.server.tracing import Span
from xpert.protocols import Piece, TokenLogprob

__all__ = ["Call", "Heard", "Reply"]


@dataclass
class Reply:
    """One whole reply."""

    text: str
    finished: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass
class Heard:
    """What has come of one task so far. `completion_tokens` counts pieces until the last one says how many, and
    `prompt_tokens` is 0 until then."""

    texts: list[str] = field(default_factory=list)
    finished: str | None = None
    completion_tokens: int = 0
    prompt_tokens: int = 0

    def take(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.completion_tokens += 1
        if piece.finished is not None:
            self.finished, self.completion_tokens = piece.finished, piece.completion_tokens
            self.prompt_tokens = piece.prompt_tokens


@dataclass
class Call:
    """What is known of a request, and what it holds until its end: `resources`, closed by whoever ends it.

    arrived: `time.monotonic` then; deadline: of the event loop's clock. stop: done once the server wants it to end.
    copies: how often each task's reply is given; greedy replies to one prompt are all the same, and computed once.
    """

    id: str
    model: str
    generation: Generation
    deadline: float
    resources: AsyncExitStack
    span: Span
    facts: Facts
    stop: asyncio.Future[XpertError]
    holder: KeyHolder | None = None
    arrived: float = field(default_factory=time.monotonic)
    created: float = field(default_factory=time.time)
    tasks: list[Task] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    copies: int = 1
    places: int = 1
    embedded_tokens: int = 0
    admission: Admission | None = None
    failure: BaseException | None = None

    @property
    def first(self) -> Task:
        return self.tasks[0]

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that answer it, each once."""
        return tuple(dict.fromkeys(key for task in self.tasks for key, _ in task.outcome.experts))

    @property
    def prompt_tokens(self) -> int:
        """Of its prompts, each counted once, however many replies it gets; of a reply that an aggregator makes, what
        all its steps took. Of embedded texts, theirs."""
        plain: dict[int, int] = {}
        aggregated = 0
        for task, heard in zip(self.tasks, self.heard, strict=True):
            own = len(task.request.prompt_ids) if task.request is not None else 0
            if task.aggregator is not None and heard.prompt_tokens:
                aggregated += heard.prompt_tokens
            else:
                plain[id(task.prompt)] = own
        return self.embedded_tokens + aggregated + sum(plain.values())

    @property
    def completion_tokens(self) -> int:
        """Computed so far."""
        return sum(heard.completion_tokens for heard in self.heard)
