"""`POST /v1/embeddings`: vectors of texts, by an embedder or by the served base's own states."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from xpert.errors import BadInput, NotFound, unknown
from xpert.experts.mixture import BASE
from xpert.experts.prototypes import FixedSpace, open_space
from xpert.experts.server.calls import Call
from xpert.experts.server.checks import about_the_model
from xpert.experts.server.schema import EmbeddingRequest, ParameterError, check_text, parse
from xpert.experts.server.service import Service
from xpert.experts.server.streams import until_gone
from xpert.protocols import Floats

__all__ = ["Embeddings", "open_server_space"]


def open_server_space(embedder: str | None, *, device: str) -> FixedSpace | None:
    """The space of an embedder other than the served base.

    Raises NotFound for an unknown one, BadInput for one that is fitted on its texts or on a base model.
    """
    if embedder is None or embedder == BASE:
        return None
    try:
        return open_space(embedder, device=device)
    except BadInput as error:
        if embedder.partition(":")[0] not in ("minilm", "st"):
            error.hint = "use minilm, st:NAME or base"
        raise


class Embeddings:
    """The endpoint for vectors. `space` is None where the base's states are given, or none are served."""

    def __init__(self, service: Service, space: FixedSpace | None) -> None:
        self.service = service
        self.space = space

    async def embed(self, request: Request) -> Response:
        """One vector of length 1 for each input."""
        service = self.service
        served = service.options.embedder
        body = parse(EmbeddingRequest, await service.read(request))
        if served is None:
            raise NotFound("this server gives no embeddings", hint="start it with --embedder minilm, or base")
        if body.model != served:
            with about_the_model():
                raise unknown("embedding model", body.model, [served])
        inputs = body.inputs
        for one in inputs:
            if isinstance(one, str):
                check_text(one, "input")
                service.check_length(len(one), "input")
        call = await service.open(request, "embd", served, 1)
        async with call.resources:
            work = self._by_base(call, inputs) if self.space is None else self._by_space(call, self.space, inputs)
            vectors = await until_gone(request, call, work)
            tokens = call.facts.prompt_tokens = call.embedded_tokens
        if body.dimensions not in (None, vectors.shape[1]):
            raise ParameterError(
                f"the vectors of {served} have {vectors.shape[1]} dimensions, not {body.dimensions}", "dimensions"
            )
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        spent = {"prompt_tokens": tokens, "total_tokens": tokens}
        content = {"object": "list", "data": data, "model": body.model, "usage": spent}
        return JSONResponse(content, headers=service.operation.headers(call.holder))

    def _let_in(self, call: Call, tokens: int) -> None:
        """Raises Busy where the key's limit is reached; nothing is embedded then."""
        call.embedded_tokens = tokens
        self.service.operation.let_in(call)

    async def _by_base(self, call: Call, inputs: Sequence[str | list[int]]) -> Floats:
        service = self.service
        if not hasattr(service.generations.engine, "embed"):
            raise BadInput("this engine gives no embeddings", hint="use --embedder minilm")
        prompts = await service.speaker.prepare(partial(self._encoded, inputs))
        self._let_in(call, sum(map(len, prompts)))
        vectors = await asyncio.gather(*(service.speaker.embed(ids) for ids in prompts))
        return np.stack(vectors).astype(np.float32)

    def _encoded(self, inputs: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
        tokenizer, context = self.service.tokenizer, self.service.generations.engine.context
        prompts = []
        for one in inputs:
            ids = tuple(tokenizer(one).input_ids) if isinstance(one, str) else tuple(one)
            if not ids:
                raise ParameterError("an input is empty", "input")
            if max(ids) >= len(tokenizer):
                raise ParameterError(f"the token {max(ids)} is not in the vocabulary of {len(tokenizer)}", "input")
            if len(ids) > context:
                raise ParameterError(f"an input has {len(ids):,} tokens; the context holds {context:,}", "input")
            prompts.append(ids)
        return prompts

    async def _by_space(self, call: Call, space: FixedSpace, inputs: Sequence[str | list[int]]) -> Floats:
        texts = [one for one in inputs if isinstance(one, str)]
        if len(texts) < len(inputs):
            raise ParameterError("this embedder takes texts, not token ids", "input")
        if not all(text.strip() for text in texts):
            raise ParameterError("an input is empty", "input")
        # The embedder's own tokenizer is not asked; a base's tokens are near enough for a count of usage.
        speaker, tokenizer = self.service.speaker, self.service.tokenizer
        # One by one, so that those who wait to be routed come in between.
        counts = [await speaker.prepare(partial(lambda text: len(tokenizer(text).input_ids), text)) for text in texts]
        self._let_in(call, sum(counts))
        return await speaker.score(partial(space.embed, texts))


def _written(vector: Floats, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
    return [float(number) for number in vector]
