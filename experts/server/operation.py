"""What runs beside every request: keys, limits, metrics, logs, traces, and the end of the server."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from fastapi import Request

from xpert.experts.server.access_log import AccessLog, json_line, text_line
from xpert.experts.server.api_keys import ApiKeys, bearer
from xpert.experts.server.calls import Call, Heard
from xpert.experts.server.draining import Draining
from xpert.experts.server.failures import Late
from xpert.experts.server.generations import Generations
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.limits import KeyLimits
from xpert.experts.server.metrics import Moment, ServerMetrics
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.replies import Task
from xpert.experts.server.request_log import RequestLog, RequestRecord
from xpert.experts.server.request_watch import Hear
from xpert.experts.server.streams import ClientGone
from xpert.experts.server.tracing import open_tracing, reply_attributes, request_attributes

__all__ = ["Operation"]

_OPEN = "/v1/"
"""Paths below it need a key where there are keys; pages, health and metrics need none."""


class Operation:
    """Made from the options before the server starts; raises what is wrong with them then."""

    def __init__(
        self,
        options: ServeOptions,
        generations: Generations,
        moment: Callable[[], Moment],
        *,
        out: TextIO | None = None,
    ) -> None:
        self.options = options
        self.keys = ApiKeys.read(options.api_keys) if options.api_keys is not None else None
        self.limits = KeyLimits()
        self.draining = Draining()
        self.tracing = open_tracing(options.trace)
        self.request_log = (
            RequestLog(options.request_log, options.request_log_replies) if options.request_log is not None else None
        )
        self._out = out or sys.stderr
        self.metrics: ServerMetrics | None = None
        if options.metrics:
            self.metrics = ServerMetrics(generations.current.mixture.keys, moment)
            generations.published.append(lambda one: self._serve(one.mixture.keys))

    def _serve(self, experts: Sequence[str]) -> None:
        assert self.metrics is not None
        self.metrics.serve(experts)

    @property
    def hears(self) -> Sequence[Hear]:
        """Who is told of each request that has ended."""
        found: list[Hear] = [self.metrics.observe] if self.metrics is not None else []
        if self.options.access_log != "none":
            found.append(AccessLog(self._out, json_line if self.options.access_log == "json" else text_line))
        return found

    async def check_key(self, request: Request) -> None:
        """Before every endpoint: puts the key's holder into the request's state. Raises Denied."""
        request.state.holder = None
        if self.keys is None or not request.url.path.startswith(_OPEN):
            return
        holder = self.keys.check(bearer(request.headers.get("authorization")))
        request.state.holder = holder
        facts = getattr(request.state, "facts", None)
        if facts is not None:
            facts.key_name = holder.name

    def let_in(self, call: Call) -> None:
        """Counts a request against its key's limits, by its prompt and the most it may answer. Raises Busy."""
        if call.holder is None:
            return
        most = sum(task.request.sampling.max_tokens for task in call.tasks if task.request is not None)
        call.admission = self.limits.admit(call.holder, call.prompt_tokens + most)

    def headers(self, holder: KeyHolder | None) -> dict[str, str]:
        return self.limits.headers(holder)

    def finish(self, call: Call) -> None:
        """Says of a call that has ended what there is to say."""
        prompt, completion = call.prompt_tokens, call.completion_tokens
        if call.admission is not None:
            call.admission.release(prompt + completion)
        facts = call.facts
        if call.tasks:
            facts.prompt_tokens, facts.completion_tokens = prompt, completion
            first = call.first
            facts.experts = call.experts
            facts.fell_back = first.routed and not first.answered.experts
            self._times(call)
            operation = "chat" if call.id.startswith("chatcmpl") else "text_completion"
            call.span.set(request_attributes(operation, call.model, first.sampling))
        call.span.set(
            reply_attributes(
                call.id,
                call.model,
                finished=[heard.finished or "none" for heard in call.heard],
                prompt_tokens=prompt,
                completion_tokens=completion,
            )
        )
        call.span.end(call.failure)
        if self.request_log is not None and call.tasks:
            asked = set()
            for task, heard in zip(call.tasks, call.heard, strict=True):
                if id(task.prompt) not in asked:  # several replies to one prompt are one request for it
                    asked.add(id(task.prompt))
                    self.request_log.record(_record(call, task, heard))

    def _times(self, call: Call) -> None:
        spans = [task.timing for task in call.tasks if task.timing.first is not None]
        if not spans:
            return
        first = min(spans, key=lambda timing: timing.first or 0.0)
        assert first.first is not None and first.last is not None
        began = first.began or first.first
        call.facts.queue_seconds = max(0.0, began - first.submitted)
        call.span.past("queue", first.submitted, began)
        call.facts.first_token_seconds = first.first - call.arrived
        if len(call.tasks) == 1:
            call.facts.token_seconds = first.last - first.first

    def close(self) -> None:
        """Sends and writes what is left."""
        if self.request_log is not None:
            self.request_log.close()
        self.tracing.close()


def _record(call: Call, task: Task, heard: Heard) -> RequestRecord:
    mixture = call.generation.mixture
    made = RequestRecord(
        id=task.id,
        time=call.created,
        mixture=mixture.name,
        fingerprint=call.generation.fingerprint,
        model=call.model,
        messages=task.prompt.messages,
        routed=task.routed,
        finished=heard.finished or _ending(call.failure),
        prompt_tokens=len(task.request.prompt_ids) if task.request is not None else 0,
        completion_tokens=heard.completion_tokens,
        seconds=time.monotonic() - call.arrived,
        reply="".join(heard.texts),
        key=call.holder.name if call.holder is not None else None,
    )
    return made.taking(task.answered)


def _ending(failure: BaseException | None) -> str:
    if failure is None or isinstance(failure, ClientGone | asyncio.CancelledError):
        return "cancelled"
    return "timeout" if isinstance(failure, Late) else "error"
