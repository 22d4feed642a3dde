"""`POST /v1/completions`: texts or token ids to go on with, and the likelihood of given ones (`echo` with `logprobs`).

An echoed prompt's log-probabilities are those of evaluation harnesses: one forward pass over prompt and reply, no
sampling, many requests in a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from xpert.errors import BadInput
from xpert.experts.server.calls import Call, Reply
from xpert.experts.server.openai_forms import DONE, completion_logprobs, event, explanation, text_length, usage
from xpert.experts.server.replies import Prompt, Task
from xpert.experts.server.schema import CompletionRequest, ParameterError, check_text, parse
from xpert.experts.server.service import Pieces, Service, check_many
from xpert.protocols import Piece, TokenLogprob
from xpert.records import Message

__all__ = ["Completions"]


class Completions:
    """The endpoint for plain texts."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def complete(self, request: Request) -> Response:
        """Goes on with each prompt, whole or streamed."""
        service = self.service
        body = parse(CompletionRequest, await service.read(request))
        sampling, constraint = body.sampling(), body.constraint()
        prompts = [self._prompt(prompt) for prompt in body.prompts]
        places = len(prompts) * body.replies
        check_many(places, service.options.max_n, "prompt")
        if body.stream and (body.max_tokens == 0 or (body.echo and body.logprobs is not None)):
            raise ParameterError("an echoed prompt's log-probabilities cannot be streamed", "stream")

        async def prepare(call: Call) -> None:
            await service.tasks(call, prompts, sampling, body.replies, constraint=constraint, choices=body.choices)
            if any(task.aggregator is not None for task in call.tasks):
                raise ParameterError(
                    "a text cannot be gone on with by several experts together",
                    "model",
                    hint="use /v1/chat/completions, or aggregator=none",
                )

        return await service.answer(
            request,
            "cmpl",
            body.model,
            places,
            prepare=prepare,
            whole=lambda call: self._whole(call, body),
            events=(lambda call, pieces: self._events(call, body, pieces)) if body.stream else None,
        )

    def _prompt(self, given: str | list[int]) -> Callable[[], Prompt]:
        """Makes the prompt on the preparing thread."""
        tokenizer = self.service.tokenizer
        if isinstance(given, str):
            check_text(given, "prompt")

        def made() -> Prompt:
            if isinstance(given, str):
                ids = tuple(tokenizer(given).input_ids)
                if not ids:
                    raise ParameterError("the prompt is empty", "prompt")
                return Prompt((Message("user", given),), ids)
            if max(given) >= len(tokenizer):
                raise ParameterError(f"the token {max(given)} is not in the vocabulary of {len(tokenizer)}", "prompt")
            return Prompt((Message("user", tokenizer.decode(given)),), tuple(given))

        return made

    async def _whole(self, call: Call, body: CompletionRequest) -> Response:
        if body.max_tokens == 0:
            replies = [Reply("", "length", len(_ids(task)), 0) for task in call.tasks]
            for heard in call.heard:
                heard.finished = "length"
        else:
            replies = await self.service.replies(call)
        echoed = await self._echoes(call, body) if body.echo else None
        choices: list[dict[str, Any]] = []
        for place, reply in enumerate(replies):
            prefix, told = echoed[place] if echoed is not None else ("", None)
            logprobs = None
            if body.logprobs is not None:
                logprobs = self._logprobs(call.tasks[place], prefix, told, reply)
            for _ in range(call.copies):
                choices.append(
                    {
                        "index": len(choices),
                        "text": prefix + reply.text,
                        "logprobs": logprobs,
                        "finish_reason": reply.finished,
                    }
                )
        content = {
            **_head(call),
            "choices": choices,
            "usage": usage(call.prompt_tokens, [reply.completion_tokens * call.copies for reply in replies]),
        }
        if body.explained:
            content["xpert"] = explanation(call.first)
        return JSONResponse(content)

    async def _echoes(self, call: Call, body: CompletionRequest) -> list[tuple[str, list[TokenLogprob] | None]]:
        """Of each task; every prompt is read once, and all of them in one batch."""
        firsts = {id(task.prompt): task for task in call.tasks}
        found = await asyncio.gather(*(self._echo(task, body) for task in firsts.values()))
        of_prompt = dict(zip(firsts, found, strict=True))
        return [of_prompt[id(task.prompt)] for task in call.tasks]

    async def _echo(self, task: Task, body: CompletionRequest) -> tuple[str, list[TokenLogprob] | None]:
        """The prompt's text, and its tokens' log-probabilities where they are asked for."""
        assert task.request is not None
        text = task.prompt.messages[0].content
        if body.logprobs is None:
            return text, None
        if len(task.request.prompt_ids) < 2:
            return text, []
        if not hasattr(self.service.generations.engine, "prompt_logprobs"):
            raise BadInput("this engine cannot tell log-probabilities of a prompt", hint="serve with torch-lora")
        return text, await self.service.speaker.prompt_logprobs(task.request, body.logprobs)

    def _logprobs(self, task: Task, prefix: str, told: list[TokenLogprob] | None, reply: Reply) -> dict[str, Any]:
        texts = self.service.texts
        if told is None:
            return completion_logprobs(reply.tokens, texts)
        first = _ids(task)[0]
        return completion_logprobs([*told, *reply.tokens], texts, first=first)

    async def _events(self, call: Call, body: CompletionRequest, pieces: Pieces) -> AsyncGenerator[str, None]:
        head = _head(call) | ({"usage": None} if body.wants_usage else {})
        offsets = [0] * (len(call.tasks) * call.copies)

        def chunk(index: int, text: str, tokens: tuple[TokenLogprob, ...] = (), finish: str | None = None) -> str:
            told = completion_logprobs(tokens, self.service.texts, offset=offsets[index]) if tokens else None
            offsets[index] += text_length((t.token for t in tokens), self.service.texts) if tokens else len(text)
            choice = {"index": index, "text": text, "logprobs": told, "finish_reason": finish}
            return event({**head, "choices": [choice]})

        if body.explained:
            yield event({**head, "choices": [], "xpert": explanation(call.first)})
        if body.echo:
            for place, task in enumerate(call.tasks):
                for index in range(place * call.copies, (place + 1) * call.copies):
                    yield chunk(index, task.prompt.messages[0].content)
        totals: dict[int, Piece] = {}
        async with aclosing(pieces):
            async for place, piece in pieces:
                for index in range(place * call.copies, (place + 1) * call.copies):
                    yield chunk(index, piece.text, piece.tokens, piece.finished)
                    if piece.finished is not None:
                        totals[index] = piece
        if body.wants_usage:
            spent = usage(call.prompt_tokens, [piece.completion_tokens for piece in totals.values()])
            yield event({**head, "choices": [], "usage": spent})
        yield DONE


def _head(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "object": "text_completion",
        "created": int(call.created),
        "model": call.model,
        "system_fingerprint": f"xpert-{call.generation.fingerprint[:16]}",
    }


def _ids(task: Task) -> tuple[int, ...]:
    assert task.request is not None
    return task.request.prompt_ids
