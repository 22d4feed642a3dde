"""Errors in OpenAI's form, as a response and as the last event of a stream."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from xpert.errors import BadInput, XpertError
from xpert.experts.server.failures import failure_headers
from xpert.experts.server.request_watch import request_id_of
from xpert.experts.server.streams import ClientGone

__all__ = ["add_error_handlers", "error_body", "error_event"]

log = logging.getLogger("xpert.server")


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error of the app OpenAI's form."""
    app.add_exception_handler(XpertError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_gone)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_defect)


def error_body(error: Exception) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`. Of a defect nothing is told but that it is logged."""
    known = isinstance(error, XpertError)
    kind = "invalid_request_error" if isinstance(error, BadInput) else "server_error"
    return {
        "error": {
            "message": str(error) if known else "the server failed; its log says why",
            "type": getattr(error, "kind", kind),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def error_event(error: Exception) -> str:
    """The event that ends a stream which fails after it began."""
    if not isinstance(error, XpertError):
        log.error("a stream failed", exc_info=error)
    return f"data: {json.dumps(error_body(error), ensure_ascii=False)}\n\n"


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, XpertError)
    return JSONResponse(error_body(error), error.http_status, headers=failure_headers(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, headers=error.headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_defect(request: Request, error: Exception) -> Response:
    # Answered outside of RequestWatch, and so without its header: here above all, somebody will look for the id.
    id = request_id_of(request.scope)
    log.error("%s %s failed (request %s)", request.method, request.url.path, id, exc_info=error)
    return JSONResponse(error_body(error), 500, headers={"x-request-id": id})
