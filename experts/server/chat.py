"""`POST /v1/chat/completions`, and `POST /v1/route` which stops before the answer."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from xpert.experts.routing import explain
from xpert.experts.server.errors import error_event
from xpert.experts.server.openai_forms import DONE, chat_logprobs, event, experts_header, explanation, usage
from xpert.experts.server.replies import Prompt
from xpert.experts.server.schema import ChatRequest, RouteBody, parse
from xpert.experts.server.service import Call, Service, check_many, read_json
from xpert.experts.server.streams import EventStream, until_gone, with_first
from xpert.protocols import Piece

__all__ = ["Chat"]


class Chat:
    """The endpoints for chat messages."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def route(self, request: Request) -> Response:
        """The route of a prompt with candidates and reason, without an answer. Takes no place in the queue."""
        service = self.service
        body = parse(RouteBody, await read_json(request, service.options.max_body))
        prompt = Prompt(tuple(message.to_message() for message in body.messages))
        with service.generations.hold() as generation:
            model = body.model or generation.mixture.name
            call = Call(f"route-{uuid.uuid4().hex}", model, generation, 0.0, AsyncExitStack())
            task = await service.route(call, prompt)
        return JSONResponse(
            explain(call.id, task.route), headers={"x-xpert-experts": experts_header(task.route.experts)}
        )

    async def complete(self, request: Request) -> Response:
        """An answer, whole or streamed."""
        service = self.service
        body = parse(ChatRequest, await read_json(request, service.options.max_body))
        sampling, constraint = body.sampling(), body.constraint()
        prompt = Prompt(tuple(message.to_message() for message in body.messages))
        check_many(body.replies, service.options.max_n, "n")
        call = await service.open(request, "chatcmpl", body.model, body.replies)
        try:
            await service.tasks(
                call, [lambda: prompt], sampling, body.replies, constraint=constraint, choices=body.choices
            )
            if body.stream:
                return await self._streamed(request, call, body)
            response = await until_gone(request, call.deadline, self._whole(call, body))
        except BaseException:
            await call.resources.aclose()
            raise
        await call.resources.aclose()
        return response

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
            "usage": usage([replies[0].prompt_tokens], [r.completion_tokens * call.copies for r in replies]),
        }
        if body.explained:
            content["xpert"] = explanation(call.first)
        return JSONResponse(content, headers=_headers(call))

    async def _streamed(self, request: Request, call: Call, body: ChatRequest) -> Response:
        # The first piece is awaited here, so that a request the engine refuses is answered by a status.
        pieces = self.service.pieces(call)
        first = await until_gone(request, call.deadline, anext(pieces))
        return EventStream(
            self._events(call, body, first, pieces),
            headers=_headers(call),
            resources=call.resources,
            deadline=call.deadline,
            last_word=error_event,
        )

    async def _events(
        self, call: Call, body: ChatRequest, first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]]
    ) -> AsyncGenerator[str, None]:
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
        async with aclosing(with_first(first, pieces)) as all_pieces:
            async for task, piece in all_pieces:
                for index in range(task * call.copies, (task + 1) * call.copies):
                    if piece.text or (body.logprobs and piece.tokens):
                        yield chunk(index, {"content": piece.text}, piece)
                    if piece.finished is not None:
                        yield chunk(index, {}, finish=piece.finished)
                        totals[index] = piece
        if body.wants_usage:
            spent = usage([totals[0].prompt_tokens], [piece.completion_tokens for piece in totals.values()])
            yield event({**head, "choices": [], "usage": spent})
        yield DONE


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": kind,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": f"xpert-{call.generation.fingerprint[:16]}",
    }


def _headers(call: Call) -> dict[str, str]:
    return {"x-xpert-experts": experts_header(call.first.outcome.experts)}
