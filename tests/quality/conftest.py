"""A scripted judge behind an OpenAI-compatible endpoint, served by a thread of the test's own process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Script = Callable[[str], Any]


class ScriptedEndpoint:
    """`script(question)` gives the reply, or an HTTP status, alone or with a message. Keeps what was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.asked.append(request)
                    owner.keys.append(self.headers.get("Authorization"))
                reply = owner.script(request["messages"][0]["content"])
                if isinstance(reply, int):
                    self._send(reply, {"error": {"message": f"scripted {reply}"}})
                elif isinstance(reply, tuple):
                    self._send(reply[0], {"error": {"message": reply[1]}})
                elif isinstance(reply, dict):
                    self._send(200, reply)
                else:
                    message = {"role": "assistant", "content": reply}
                    self._send(200, {"id": "1", "choices": [{"index": 0, "message": message}], "object": "x"})

            def _send(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.spec = f"http://127.0.0.1:{self.server.server_port}/v1#scripted"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def endpoint() -> Iterator[Callable[[Script], ScriptedEndpoint]]:
    """Starts scripted endpoints: `endpoint(lambda question: "A").spec`."""
    started: list[ScriptedEndpoint] = []

    def start(script: Script) -> ScriptedEndpoint:
        started.append(ScriptedEndpoint(script))
        return started[-1]

    yield start
    for one in started:
        one.close()
