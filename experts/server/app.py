"""The OpenAI-compatible server: `model` is the mixture (the router chooses), one of its experts, or `base`.

GET  /v1/models                   the mixture, its experts, the base
POST /v1/chat/completions         answers, streamed or whole; `x-xpert-experts` says who answered
POST /v1/route                    the route of a prompt with candidates and reason, without an answer
GET  /healthz                     whether the engine runs
GET  /                            a page to try it, with its files under /page/
GET  /registry/                   the registry behind it as pages: experts, scores, provenance
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException

import xpert
from xpert.errors import BadInput, NotFound, XpertError
from xpert.experts.mixture import BASE
from xpert.experts.routing import explain
from xpert.experts.server import page_files
from xpert.experts.server.engine_loop import EngineLoop
from xpert.experts.server.registry_pages import RegistryPages
from xpert.experts.server.schema import ChatRequest, ParameterError, RouteBody, parse
from xpert.experts.serving import MixtureRunner
from xpert.protocols import EngineRequest, Piece, Route, RouteRequest, Sampling
from xpert.records import Message

__all__ = ["create_app"]

log = logging.getLogger("xpert.server")

MAX_BODY = 8 << 20
T = TypeVar("T")


def create_app(runner: MixtureRunner) -> FastAPI:
    """The application; its engine thread lives as long as the application runs."""
    service = _Service(runner)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="xpert", version=xpert.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(XpertError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)

    def add(path: str, method: str, handler: Callable[..., Awaitable[Response]], body: type | None = None) -> None:
        extra: dict[str, Any] = {}
        if body is not None:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")  # type: ignore[attr-defined]
            extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.add_api_route(path, handler, methods=[method], response_model=None, openapi_extra=extra)

    for path in page_files.PATHS:
        app.add_api_route(path, service.page, methods=["GET"], include_in_schema=False)
    add("/registry", "GET", service.to_registry)
    add("/registry/{path:path}", "GET", service.registry_page)
    add("/healthz", "GET", service.health)
    add("/v1/models", "GET", service.models)
    add("/v1/models/{model:path}", "GET", service.model)
    add("/v1/route", "POST", service.explain, RouteBody)
    add("/v1/chat/completions", "POST", service.chat, ChatRequest)
    return app


@dataclass(frozen=True)
class _Job:
    """A chat request that is routed, encoded and ready for the engine."""

    id: str
    model: str
    route: Route
    request: EngineRequest
    created: int

    @property
    def headers(self) -> dict[str, str]:
        return {"x-xpert-experts": _experts_header(self.route), "x-request-id": self.id}


class _Service:
    def __init__(self, runner: MixtureRunner) -> None:
        self.runner = runner
        self.created = int(time.time())
        self.pages = RegistryPages(runner.mixture)
        # Routing and encoding take turns on one thread, with a tokenizer of their own: a fast tokenizer that two
        # threads use at once raises "Already borrowed".
        self.tokenizer = copy.deepcopy(runner.lm.tokenizer)
        self.loop: EngineLoop
        self.preparer: ThreadPoolExecutor

    def start(self) -> None:
        self.loop = EngineLoop(self.runner.engine)
        self.preparer = ThreadPoolExecutor(1, thread_name_prefix="xpert-route")

    def stop(self) -> None:
        self.preparer.shutdown()
        self.loop.close()

    # ── what there is ────────────────────────────────────────────────────────────────────────────────────────────

    async def page(self, request: Request) -> Response:
        found = page_files.get(request.scope["route"].path)  # not the URL's, which may have a proxy's prefix
        if found is None:
            raise HTTPException(404, "there is no such page")
        content, headers = found
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    async def to_registry(self) -> Response:
        return RedirectResponse("registry/")

    async def registry_page(self, path: str) -> Response:
        found = await asyncio.to_thread(self.pages.get, path)
        if found is None:
            raise HTTPException(404, "there is no such page")
        content, headers = found
        return Response(content, headers=headers)

    async def health(self) -> Response:
        sound = self.loop.alive
        status = {"status": "ok" if sound else "the engine has stopped", "active": self.loop.active}
        return JSONResponse(status, 200 if sound else 503)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, model: str) -> Response:
        self.runner.experts_of_model(model)
        return JSONResponse(next(entry for entry in self._models() if entry["id"] == model))

    def _models(self) -> list[dict[str, Any]]:
        mixture = self.runner.mixture
        rows: list[tuple[str, dict[str, Any]]] = [
            (mixture.name, {"kind": "mixture", "router": mixture.router, "experts": list(mixture.keys)}),
            *(
                (e.key, {"kind": "expert", "ref": e.ref, "skills": list(e.card.skills), "about": e.card.description})
                for e in mixture.experts
            ),
            (BASE, {"kind": "base", "ref": mixture.base.ref}),
        ]
        return [
            {"id": id, "object": "model", "created": self.created, "owned_by": "xpert", "xpert": about}
            for id, about in rows
        ]

    # ── routing ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def explain(self, request: Request) -> Response:
        body = parse(RouteBody, await _json(request))
        messages = tuple(message.to_message() for message in body.messages)
        id = f"route-{uuid.uuid4().hex}"
        route = await self._prepare(lambda: self._route(id, body.model or self.runner.mixture.name, messages))
        return JSONResponse(explain(id, route), headers={"x-xpert-experts": _experts_header(route)})

    def _route(self, id: str, model: str, messages: tuple[Message, ...]) -> Route:
        try:
            experts = self.runner.experts_of_model(model)
        except NotFound as error:
            error.param, error.code = "model", "model_not_found"  # type: ignore[attr-defined]
            raise
        if experts is not None:
            return self.runner.known(experts)
        return self.runner.route([RouteRequest(id, messages)])[0]

    async def _prepare(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.preparer, work)

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────────────

    async def chat(self, request: Request) -> Response:
        body = parse(ChatRequest, await _json(request))
        sampling = body.sampling()
        messages = tuple(message.to_message() for message in body.messages)
        job = await self._prepare(lambda: self._job(body.model, messages, sampling))
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            # The first piece is awaited here, so that a request the engine refuses is answered by a status.
            pieces = self._pieces(job)
            first = await anext(pieces)
            events = self._events(job, first, pieces, usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={**job.headers, "cache-control": "no-cache"}
            )
        return await self._whole(request, job)

    def _job(self, model: str, messages: tuple[Message, ...], sampling: Sampling) -> _Job:
        id = f"chatcmpl-{uuid.uuid4().hex}"
        route = self._route(id, model, messages)
        routed = self.runner.experts_of_model(model) is None
        engine_request = self.runner.engine_request(
            id, messages, route.experts, sampling, gated=routed, tokenizer=self.tokenizer
        )
        return _Job(id, model, route, engine_request, int(time.time()))

    async def _pieces(self, job: _Job) -> AsyncIterator[Piece]:
        """The pieces of one reply. Left before its end, the request gives up its place in the batch."""
        arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        events = asyncio.get_running_loop()

        def hear(item: Piece | Exception) -> None:
            events.call_soon_threadsafe(arrived.put_nowait, item)

        self.loop.submit(job.request, hear)
        finished = False
        try:
            while not finished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished is not None
                yield item
        finally:
            if not finished:
                self.loop.cancel(job.id)

    async def _whole(self, request: Request, job: _Job) -> Response:
        answering = asyncio.ensure_future(_collect(self._pieces(job)))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # nobody reads it
            text, last = answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": last.finished,
        }
        body = {**_head(job, "chat.completion"), "choices": [choice], "usage": _usage(last)}
        return JSONResponse(body, headers=job.headers)

    async def _events(self, job: _Job, first: Piece, rest: AsyncIterator[Piece], usage: bool) -> AsyncIterator[str]:
        head = _head(job, "chat.completion.chunk") | ({"usage": None} if usage else {})

        def event(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return _sse({**head, "choices": [choice]})

        yield event({"role": "assistant", "content": ""})
        piece = first
        try:
            while True:
                if piece.text:
                    yield event({"content": piece.text})
                if piece.finished is not None:
                    break
                piece = await anext(rest)
        except Exception as error:
            yield _sse(_error_body(error))
            return
        finally:
            await rest.aclose()  # type: ignore[attr-defined]
        yield event({}, piece.finished)
        if usage:
            yield _sse({**head, "choices": [], "usage": _usage(piece)})
        yield "data: [DONE]\n\n"


async def _collect(pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    texts = []
    last: Piece | None = None
    async for piece in pieces:
        texts.append(piece.text)
        last = piece
    assert last is not None
    return "".join(texts), last


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> Any:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY >> 20} MiB")
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ParameterError(f"the body is not valid JSON: {error}", None) from None


def _head(job: _Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _usage(last: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def _experts_header(route: Route) -> str:
    """`a=0.7,b=0.3`, or `base`; characters that a header cannot hold are percent-encoded."""
    return ",".join(f"{quote(key, safe='/@._-')}={weight:.4g}" for key, weight in route.experts) or BASE


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# ── errors, in OpenAI's form ─────────────────────────────────────────────────────────────────────────────────────


def _error_body(error: Exception) -> dict[str, Any]:
    known = isinstance(error, XpertError)
    return {
        "error": {
            "message": str(error) if known else "the server failed; its log says why",
            "type": "invalid_request_error" if isinstance(error, BadInput) else "server_error",
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, XpertError)
    return JSONResponse(_error_body(error), error.http_status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, headers=error.headers)


async def _on_defect(request: Request, error: Exception) -> Response:
    return JSONResponse(_error_body(error), 500)
