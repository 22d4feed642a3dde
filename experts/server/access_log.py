"""The access log: one line per request, when it has ended, as JSON or as text.

No line holds a prompt, a reply, a key or a query string. What a client chooses (path, model) is cut to a fair length
and escaped, so that no request can feign a second line or steer the terminal of who reads it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TextIO

from xpert.experts.server.request_watch import Seen

__all__ = ["AccessLog", "json_line", "text_line"]

_MOST = 256  # characters of a path or a model's name
_PLAIN = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&()*+,-./:;<=>?@[]^_{|}~")


class AccessLog:
    """Writes lines to a stream; a `Hear` of RequestWatch. A stream that breaks loses lines, never requests: `lost`
    counts them. May be called by several threads."""

    def __init__(self, stream: TextIO, form: Callable[[Seen], str]) -> None:
        self.lost = 0
        self._stream = stream
        self._form = form
        self._lock = threading.Lock()

    def __call__(self, seen: Seen) -> None:
        line = f"{self._form(seen)}\n"
        with self._lock:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):  # full, gone, or closed
                self.lost += 1


def json_line(seen: Seen) -> str:
    """One JSON object of ASCII; what is not known of a request has no field."""
    return json.dumps(dict(_fields(seen)))


def text_line(seen: Seen) -> str:
    """`TIME CLIENT METHOD PATH STATUS` and then `field=value`; values with blanks or odd characters are quoted as in
    JSON."""
    values = {name: _word(value) for name, value in _fields(seen)}
    head = " ".join(values.pop(name) for name in ("time", "client", "method", "path", "status"))
    return " ".join((head, *(f"{name}={value}" for name, value in values.items())))


def _fields(seen: Seen) -> list[tuple[str, object]]:
    facts = seen.facts
    named = [
        ("time", _time(seen.time)),
        ("id", seen.id),
        ("client", seen.client),
        ("method", seen.method[:_MOST]),
        ("path", seen.path[:_MOST]),
        ("status", seen.status),
        ("ended", seen.ended),
        ("seconds", round(seen.seconds, 4)),
        ("ttfb_seconds", None if seen.ttfb_seconds is None else round(seen.ttfb_seconds, 4)),
        ("bytes", seen.bytes),
        ("key", facts.key_name),
        ("model", None if facts.model is None else facts.model[:_MOST]),
        ("experts", ",".join(facts.experts) if facts.experts else None),
        ("prompt_tokens", facts.prompt_tokens),
        ("completion_tokens", facts.completion_tokens),
    ]
    return [(name, value) for name, value in named if value is not None]


def _time(seconds: float) -> str:
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def _word(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text)
