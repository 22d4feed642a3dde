"""`POST /v1/chat/completions`, and `POST /v1/route` which stops before the answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from xpert.experts.routing import explain
from xpert.experts.server.calls import Call
from xpert.experts.server.failures import Late
from xpert.experts.server.openai_forms import DONE, chat_logprobs, event, experts_header, explanation, usage
from xpert.experts.server.replies import Prompt
from xpert.experts.server.schema import ChatMessage, ChatRequest, RouteBody, parse
from xpert.experts.server.service import Pieces, Service, check_allowed, check_many
from xpert.protocols import Piece

__all__ = ["Chat"]


class Chat:
    """The endpoints for chat messages."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def route(self, request: Request) -> Response:
        """The route of a prompt with candidates and reason, without an answer. Takes no place in the queue, and counts
        as a request of its key."""
        service = self.service
        body = parse(RouteBody, await service.read(request))
        prompt = _prompt(body.messages)
        holder = getattr(request.state, "holder", None)
        seconds = service.allowed(request)
        with service.generations.hold() as generation, service.operation.limits.admit(holder, 0):
            model = body.model if body.model is not None else generation.mixture.name
            check_allowed(holder, model, generation)
            try:
                async with asyncio.timeout(seconds):
                    task = await service.route(f"route-{uuid.uuid4().hex}", model, generation, prompt)
            except TimeoutError:
                raise Late("the request's deadline passed before its route was found") from None
        headers = {"x-xpert-experts": experts_header(task.route.experts)}
        return JSONResponse(explain(task.id, task.route), headers=headers)

    async def complete(self, request: Request) -> Response:
        """An answer, whole or streamed."""
        service = self.service
        body = parse(ChatRequest, await service.read(request))
        sampling, constraint, prompt = body.sampling(), body.constraint(), _prompt(body.messages)
        check_many(body.replies, service.options.max_n, "n")
        return await service.answer(
            request,
            "chatcmpl",
            body.model,
            body.replies,
            prepare=lambda call: service.tasks(
                call, [lambda: prompt], sampling, body.replies, constraint=constraint, choices=body.choices
            ),
            whole=lambda call: self._whole(call, body),
            events=(lambda call, pieces: self._events(call, body, pieces)) if body.stream else None,
        )

    async def _whole(self, call: Call, body: ChatRequest) -> Response:
        replies = await self.service.replies(call)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": chat_logprobs(reply.tokens, self.service.texts, self.service.ends)
                if body.logprobs
                else None,
                "finish_reason": reply.finished,
            }
            for index, reply in enumerate(one for one in replies for _ in range(call.copies))
        ]
        content = {
            **_head(call, "chat.completion"),
            "choices": choices,
            "usage": usage(call.prompt_tokens, [reply.completion_tokens * call.copies for reply in replies]),
        }
        if body.explained:
            content["xpert"] = explanation(call.first)
        return JSONResponse(content)

    async def _events(self, call: Call, body: ChatRequest, pieces: Pieces) -> AsyncGenerator[str, None]:
        head = _head(call, "chat.completion.chunk") | ({"usage": None} if body.wants_usage else {})

        def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None, finish: str | None = None) -> str:
            logprobs = (
                chat_logprobs(piece.tokens, self.service.texts, self.service.ends)
                if piece is not None and body.logprobs
                else None
            )
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return event({**head, "choices": [choice]})

        if body.explained:
            yield event({**head, "choices": [], "xpert": explanation(call.first)})
        for index in range(len(call.tasks) * call.copies):
            yield chunk(index, {"role": "assistant", "content": ""})
        totals: dict[int, Piece] = {}
        async with aclosing(pieces):
            async for task, piece in pieces:
                for index in range(task * call.copies, (task + 1) * call.copies):
                    if piece.text or (body.logprobs and piece.tokens):
                        yield chunk(index, {"content": piece.text}, piece)
                    if piece.finished is not None:
                        yield chunk(index, {}, finish=piece.finished)
                        totals[index] = piece
        if body.wants_usage:
            spent = usage(call.prompt_tokens, [piece.completion_tokens for piece in totals.values()])
            yield event({**head, "choices": [], "usage": spent})
        yield DONE


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind,
        "created": int(call.created),
        "model": call.model,
        "system_fingerprint": f"xpert-{call.generation.fingerprint[:16]}",
    }


def _prompt(messages: Sequence[ChatMessage]) -> Prompt:
    return Prompt(tuple(message.to_message() for message in messages))
