"""A server for tests of the page: the real application, and before it a front that can change what the page sees.

It can ask for a key, slow an answer down so that it can be stopped, and answer in the server's place what only some
mixtures, routers or settings would bring about (votes, escalations, negative scores, errors in the middle).
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["PREFIX", "Front", "ServedPage", "sse"]

PREFIX = "/behind/a/proxy"
"""Taken off the front of paths, as proxies do."""


def sse(*events: Any, done: bool = True) -> bytes:
    """Server-sent events of these JSON values."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, *(["data: [DONE]\n\n"] if done else [])]).encode()


class Front:
    """asked: (path, body) of every POST. Told to do nothing, it is the application alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.looked = 0
        self.reset()

    def reset(self) -> None:
        self.key = ""
        self.pace = 0.0
        self.told: Mapping[str, Mapping[str, Any]] = {}
        self.answers: dict[str, tuple[Any, dict[str, str]]] = {}
        self.missing: set[str] = set()
        self.asked.clear()
        self.looked = 0

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith(PREFIX):
            scope = {**scope, "path": scope["path"].removeprefix(PREFIX), "raw_path": None}
        path = scope["path"]
        if path == "/v1/load":
            self.looked += 1
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["method"] == "POST":
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message.get("more_body"):
                    break
            self.asked.append((path, json.loads(body)))
            receive = _again(body, receive)
        if self.key and path.startswith("/v1") and headers.get("authorization") != f"Bearer {self.key}":
            error = {"message": "the API key is missing or unknown", "code": "invalid_api_key"}
            return await _answer(send, 401, {"error": error}, {})
        if path in self.missing:
            return await _answer(send, 404, {"error": {"message": "there is no such page"}}, {})
        if path in self.answers:
            return await _answer(send, 200, *self.answers[path])

        async def changed(message: Message) -> None:
            if path == "/v1/chat/completions" and message["type"] == "http.response.body":
                await asyncio.sleep(self.pace)
            if path == "/v1/models" and message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"content-length"]
            if path == "/v1/models" and message["type"] == "http.response.body" and message["body"]:
                models = json.loads(message["body"])
                for model in models["data"]:
                    model["xpert"] |= self.told.get(model["id"], {})
                message["body"] = json.dumps(models).encode()
            await send(message)

        return await self.app(scope, receive, changed)


def _again(body: bytes, rest: Receive) -> Receive:
    """The body that was read, once more, and then what follows: word that the client has gone."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return await rest()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _answer(send: Send, status: int, content: Any, headers: Mapping[str, str]) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": data})


class ServedPage:
    """An application behind a front, on a port of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.front = Front(app)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(self.front, log_level="warning", ws="none", lifespan="on"))
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def active(self) -> int:
        return int(httpx.get(f"{self.url}healthz").json()["active"])

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()
