"""The server's OpenAPI description: what each endpoint takes and what it may answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel

from xpert.experts.server.body_schemas import body_schema

__all__ = ["add_route"]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_WHY = {
    400: "A parameter is wrong; the message names it",
    401: "The API key is missing or unknown",
    403: "The API key may not ask for this model",
    404: "There is no such model, or no such page",
    405: "The method is not allowed",
    408: "The deadline passed, or the body came too slowly",
    413: "The body is too large",
    422: "Stored data is damaged",
    429: "The queue is full, or a limit is reached; come again after Retry-After",
    500: "A defect of the server",
    503: "The server is shutting down, or the engine has stopped",
}
_GET = (401, 404, 422, 429, 500, 503)
_POST = (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)
_PAGES = {"/": "text/html", "/registry": None, "/registry/{path:path}": "text/html", "/metrics": "text/plain"}


def add_route(
    app: FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    summary: str,
    body: type[BaseModel] | None = None,
    *,
    most_replies: int = 1,
) -> None:
    """Adds an endpoint whose body, a pydantic model, the handler reads and checks itself."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": _WHY[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in (_GET if method == "GET" else _POST)
    }
    kind = _PAGES.get(path, "application/json")
    ok: dict[str, Any] = {"description": summary}
    if kind is not None:
        ok["content"] = {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}}}
    if path in ("/v1/chat/completions", "/v1/completions"):
        ok["content"]["text/event-stream"] = {}  # OpenAPI before 3.2 cannot describe a sequence of events
    responses[200 if path != "/registry" else 307] = ok
    extra: dict[str, Any] = {}
    if body is not None:
        schema, parts = body_schema(body, most_replies=most_replies)
        _components(app).update(parts)
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    app.add_api_route(
        path,
        handler,
        methods=[method],
        summary=summary,
        response_model=None,
        response_class=Response,
        responses=responses,
        openapi_extra=extra,
    )


def _components(app: FastAPI) -> dict[str, Any]:
    """The schemas of bodies, put among the description's components when it is first asked for."""
    found: dict[str, Any] | None = getattr(app.state, "body_schemas", None)
    if found is None:
        found = app.state.body_schemas = {}
        plain = app.openapi

        def described() -> dict[str, Any]:
            document = plain()
            document.setdefault("components", {}).setdefault("schemas", {}).update(found)
            return document

        app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend the description
    return found
