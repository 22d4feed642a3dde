"""Clients that leave: a request sent over a bare socket, and waiting for what the server makes of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

__all__ = ["opened", "until"]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def opened(url: str, body: dict[str, Any]) -> socket.socket:
    """A request that was sent and whose answer nobody reads yet."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head + content)
    return connection
