"""A running vLLM server, by its documented HTTP interface.

    GET  /v1/models                the base's name and context
    POST /v1/completions           prompts as token ids; replies as server-sent events, with token ids
    POST /v1/load_lora_adapter     and /v1/unload_lora_adapter: a server that was started with
                                   VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora

A connection per request: closing it is how vLLM is told to give the request up.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from xpert.errors import BadInput, Unavailable, XpertError, unknown
from xpert.experts.engines._vllm_backend import AdapterLost, Ask, Chunk, Served
from xpert.protocols import TokenLogprob

__all__ = ["HttpBackend"]

CONNECT_SECONDS = 10.0
START = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK"


class HttpBackend:
    """Implements `_vllm_backend.Backend` over HTTP.

    `timeout`: seconds of silence after which a connection counts as lost. Raises Unavailable where no vLLM answers.
    """

    def __init__(
        self, base_url: str, *, model: str | None = None, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"base-url is {base_url!r}", hint="give it as http://HOST:PORT")
        self._url = base_url
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        card = self._choose(model)
        self.model = str(card["id"])
        self._context = int(card["max_model_len"])

    @property
    def context(self) -> int:
        return self._context

    def load(self, adapter: Served) -> None:
        body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        status, reply = self._exchange("POST", "/v1/load_lora_adapter", body)
        message = _message(reply)
        if status == 200 or (status == 400 and "already been loaded" in message):
            return  # the name holds the content's hash, so what is loaded under it is this adapter
        if status == 404 and adapter.name not in message:
            raise Unavailable("the vLLM server does not load adapters while it runs", where=self._url, hint=START)
        if "max_lora_rank" in message:
            raise BadInput(
                f"vLLM refuses an adapter: {message}",
                where=self._url,
                hint="start it with a greater --max-lora-rank, and set max-lora-rank here to the same",
            )
        raise _error(status, f"vLLM refuses an adapter: {message}", self._url)

    def unload(self, adapter: Served) -> None:
        status, reply = self._exchange("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})
        if status not in (200, 404):
            raise _error(status, _message(reply), self._url)

    def open(self, ask: Ask) -> _HttpStream:
        body = self._body(ask) | {"stream": True, "return_token_ids": True}
        if "logprobs" in body:
            body["return_tokens_as_token_ids"] = True
        return _HttpStream(self, ask, body)

    def score(self, ask: Ask, token: int) -> float:
        body = self._body(ask) | {"return_tokens_as_token_ids": True}
        status, reply = self._exchange("POST", "/v1/completions", body)
        if status != 200:
            raise self.refusal(status, reply, ask)
        try:
            return float(reply["choices"][0]["logprobs"]["top_logprobs"][0][f"token_id:{token}"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise Unavailable(
                "the server answers without the log-probability asked for",
                where=self._url,
                hint="use vLLM 0.32 or later",
            ) from None

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise Unavailable(
                f"no vLLM server answers ({error})", where=self._url, hint=f"{START}, or give another base-url"
            ) from None
        connection.sock.settimeout(self._timeout)
        return connection

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        payload = None if body is None else json.dumps(body).encode()
        connection.request(method, self._root + path, payload, self._headers | {"Connection": "close"})
        return connection.getresponse()

    def lost(self, error: Exception) -> Unavailable:
        return Unavailable(f"the connection to vLLM was lost ({error or type(error).__name__})", where=self._url)

    def refusal(self, status: int, reply: Any, ask: Ask) -> Exception:
        """What a completion that was not begun means."""
        message = _message(reply)
        if status == 404 and ask.adapter is not None and ask.adapter.name in message:
            return AdapterLost(message)
        return _error(status, message, self._url)

    def _exchange(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, reply): JSON where it is JSON, else text."""
        connection = self.connect()
        try:
            response = self.send(connection, method, path, body)
            return response.status, _decoded(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self.lost(error) from None
        finally:
            connection.close()

    def _choose(self, model: str | None) -> Mapping[str, Any]:
        """The card of the base model among those served."""
        status, reply = self._exchange("GET", "/v1/models")
        if status != 200:
            raise _error(status, _message(reply), self._url)
        try:
            cards = {str(card["id"]): card for card in reply["data"] if not card.get("parent")}
            for card in cards.values():
                int(card["max_model_len"])
        except (KeyError, TypeError, AttributeError, ValueError):
            raise Unavailable("the server is no vLLM: its models tell no max_model_len", where=self._url) from None
        if not cards:
            raise Unavailable("the server serves no base model", where=self._url)
        if model is not None and model not in cards:
            raise unknown("model", model, cards, where=self._url)
        return cards[model] if model is not None else next(iter(cards.values()))

    def _body(self, ask: Ask) -> dict[str, Any]:
        model = self.model if ask.adapter is None else ask.adapter.name
        return {"model": model, "prompt": list(ask.prompt_ids), **ask.fields}


class _HttpStream:
    """The server-sent events of one completion."""

    def __init__(self, backend: HttpBackend, ask: Ask, body: Mapping[str, Any]) -> None:
        self._backend = backend
        self._ask = ask
        self._body = body
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        connection = self._backend.connect()
        try:
            with self._lock:
                if self._closed:
                    return
                self._socket = connection.sock
            response = self._backend.send(connection, "POST", "/v1/completions", self._body)
            if response.status != 200:
                raise self._backend.refusal(response.status, _decoded(response.read()), self._ask)
            yield from self._chunks(response)
        except (OSError, http.client.HTTPException) as error:
            if not self._closed:
                raise self._backend.lost(error) from None
        finally:
            with self._lock:
                self._socket = None
            connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the server was faster

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[Chunk]:
        while line := response.readline():
            text = line.decode().strip()
            if not text.startswith("data:"):
                continue
            text = text.removeprefix("data:").strip()
            if text == "[DONE]":
                break
            chunk = self._chunk(_decoded(text))
            if chunk is not None:
                yield chunk
                if chunk.finished:
                    return
        if not self._closed:
            raise Unavailable("the server ended a reply before its end", where=self._backend._url)

    def _chunk(self, event: Any) -> Chunk | None:
        url = self._backend._url
        if isinstance(event, dict) and "error" in event:
            code = event["error"].get("code") if isinstance(event["error"], dict) else None
            raise _error(code if isinstance(code, int) else 500, _message(event), url)
        try:
            if not event["choices"]:
                return None  # counts of tokens, which some servers always send
            choice = event["choices"][0]
            tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
            reason = choice.get("finish_reason")
            if tokens is None:
                raise Unavailable("the server sends no token ids", where=url, hint="use vLLM 0.32 or later")
            told = _logprobs(logprobs, self._ask.fields.get("logprobs", 0)) if logprobs else ()
            chunk = Chunk(tuple(int(token) for token in tokens), told, reason)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Unavailable(f"the server's reply is not a completion ({error!r})", where=url) from None
        if reason not in (None, "stop", "length"):
            raise Unavailable(f"vLLM gave the request up ({reason})", where=url)
        return chunk


def _logprobs(told: Mapping[str, Any], count: int) -> tuple[TokenLogprob, ...]:
    """Tokens come as "token_id:17"; the likeliest include the chosen one where it is among them."""

    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    found = []
    for token, logprob, others in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        best = sorted(((number(name), float(value)) for name, value in others.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(number(token), float(logprob), tuple(best[:count])))
    return tuple(found)


def _decoded(reply: bytes | str) -> Any:
    try:
        return json.loads(reply)
    except ValueError:
        return reply.decode(errors="replace") if isinstance(reply, bytes) else reply


def _message(reply: Any) -> str:
    """What the server says is wrong: {"error": {"message": ...}}, or {"message": ...} of older versions."""
    if isinstance(reply, dict):
        inner = reply.get("error", reply)
        if isinstance(inner, dict):
            reply = inner.get("message") or inner.get("detail") or inner
        else:
            reply = inner
    return " ".join(str(reply).split())[:500] or "no reason given"


def _error(status: int, message: str, where: str) -> XpertError:
    if status in (401, 403):
        return Unavailable(
            f"vLLM wants an API key ({message})", where=where, hint="set VLLM_API_KEY to the one it was started with"
        )
    if 400 <= status < 500 and status not in (408, 429):
        return BadInput(message, where=where)
    return Unavailable(f"vLLM fails with status {status}: {message}", where=where)
