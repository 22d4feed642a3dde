"""The OpenAI-compatible server: `model` is the mixture (the router chooses), one of its experts, or `base`.

GET  /v1/models                   the mixture, its experts, the base
POST /v1/chat/completions         answers, streamed or whole; `x-xpert-experts` says who answered
POST /v1/completions              goes on with texts or token ids; `echo` with `logprobs` weighs given ones
POST /v1/embeddings               vectors of texts
POST /v1/route                    the route of a prompt with candidates and reason, without an answer
GET  /v1/load                     what the server is doing now
GET  /healthz, /readyz            whether the engine runs; whether new requests are taken
GET  /metrics                     figures for Prometheus
GET  /                            a page to try it, with its files under /page/
GET  /registry/                   the registry behind it as pages: experts, scores, provenance
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import xpert
from xpert.experts.prototypes import FixedSpace
from xpert.experts.server import page_files
from xpert.experts.server.chat import Chat
from xpert.experts.server.completions import Completions
from xpert.experts.server.description import add_route
from xpert.experts.server.embeddings import Embeddings, open_server_space
from xpert.experts.server.errors import add_error_handlers
from xpert.experts.server.generations import Generations
from xpert.experts.server.head import HeadAsGet
from xpert.experts.server.memory import keep_trimmed
from xpert.experts.server.model_list import model_list
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.registry_pages import RegistryPages
from xpert.experts.server.request_watch import RequestWatch
from xpert.experts.server.schema import ChatRequest, CompletionRequest, EmbeddingRequest, RouteBody
from xpert.experts.server.service import Service
from xpert.experts.server.watching import Watch

__all__ = ["create_app"]

TOLD_HEADERS = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-xpert-experts",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
"""What a page of another origin may read of an answer, where it may ask at all."""


def create_app(
    generations: Generations,
    options: ServeOptions | None = None,
    *,
    device: str = "auto",
    watch: Watch | None = None,
    space: FixedSpace | None = None,
) -> FastAPI:
    """The application; its engine thread, and the watch over what it serves, live as long as the application runs.

    `space` is that of the options' embedder, where it was opened already.
    """
    options = options or ServeOptions()
    service = Service(generations, options)
    space = space or open_server_space(options.embedder, device=device)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        trimming = asyncio.create_task(keep_trimmed())
        if watch is not None:
            watch.start()
        yield
        trimming.cancel()
        if watch is not None:
            await asyncio.to_thread(watch.close)
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="xpert",
        version=xpert.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(service.operation.check_key)],
    )
    app.state.service = service
    app.add_middleware(HeadAsGet)
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=TOLD_HEADERS,
        )
    app.add_middleware(RequestWatch, hear=service.operation.hears)
    add_error_handlers(app)
    chat, completions, embeddings = Chat(service), Completions(service), Embeddings(service, space)
    pages = _Pages(service)
    most = min(options.max_n, options.max_batch + options.max_queue)
    add_route(app, "GET", "/", pages.playground, "A page to try the server")
    for path in page_files.PATHS[1:]:
        app.add_api_route(path, pages.playground, methods=["GET"], include_in_schema=False)
    add_route(app, "GET", "/registry", pages.to_registry, "Leads to /registry/")
    add_route(app, "GET", "/registry/{path:path}", pages.registry, "The registry behind the mixture as pages")
    add_route(app, "GET", "/healthz", pages.health, "Whether the engine runs")
    add_route(app, "GET", "/readyz", pages.ready, "Whether new requests are taken")
    if service.operation.metrics is not None:
        add_route(app, "GET", "/metrics", pages.metrics, "Figures for Prometheus")
    add_route(app, "GET", "/v1/load", pages.load, "What the server is doing now")
    add_route(app, "GET", "/v1/models", pages.models, "What can be asked for")
    add_route(app, "GET", "/v1/models/{model:path}", pages.model, "One of the models")
    add_route(app, "POST", "/v1/route", chat.route, "The route of a prompt, without an answer", RouteBody)
    add_route(
        app, "POST", "/v1/chat/completions", chat.complete, "An answer to chat messages", ChatRequest, most_replies=most
    )
    add_route(
        app, "POST", "/v1/completions", completions.complete, "Goes on with texts", CompletionRequest, most_replies=most
    )
    add_route(app, "POST", "/v1/embeddings", embeddings.embed, "Vectors of texts", EmbeddingRequest)
    return app


class _Pages:
    """What is read and not computed."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._registry: tuple[int, RegistryPages] | None = None

    async def playground(self, request: Request) -> Response:
        found = page_files.get(request.scope["route"].path)  # not the URL's, which may have a proxy's prefix
        if found is None:
            raise HTTPException(404, "there is no such page")
        content, headers = found
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    async def to_registry(self) -> Response:
        return RedirectResponse("registry/")

    async def registry(self, path: str) -> Response:
        generation = self.service.generations.current
        if self._registry is None or self._registry[0] != generation.number:
            self._registry = generation.number, RegistryPages(generation.mixture)
        found = await asyncio.to_thread(self._registry[1].get, path)
        if found is None:
            raise HTTPException(404, "there is no such page")
        content, headers = found
        return Response(content, headers=headers)

    async def health(self) -> Response:
        loop = self.service.speaker.loop
        status = {"status": "ok" if loop.alive else "the engine has stopped", "active": loop.active}
        return JSONResponse(status, 200 if loop.alive else 503)

    async def ready(self) -> Response:
        ready = self.service.ready
        return JSONResponse({"status": "ready" if ready else "not taking requests"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        assert self.service.operation.metrics is not None
        content, media_type = self.service.operation.metrics.render(request.headers.get("accept"))
        return Response(content, media_type=media_type)

    async def load(self) -> Response:
        return JSONResponse(self.service.load())

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, model: str) -> Response:
        known = {entry["id"]: entry for entry in self._models()}
        if model not in known:
            await asyncio.to_thread(self.service.check_way, model)
        return JSONResponse(known.get(model) or {**self._models()[0], "id": model})

    def _models(self) -> list[dict[str, object]]:
        generation = self.service.generations.current
        return model_list(generation.mixture, created=int(generation.created), embedder=self.service.options.embedder)
