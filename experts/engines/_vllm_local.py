"""vLLM in this process: its `AsyncLLM` on a thread of its own, each adapter a `LoRARequest`."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

from xpert.errors import BadInput, Unavailable, XpertError
from xpert.experts.engines._vllm_backend import Ask, Chunk, Served
from xpert.protocols import TokenLogprob

__all__ = ["LocalBackend"]

LISTENS = 0.2
"""Seconds between looks at whether a stream was closed, while vLLM is silent."""


class LocalBackend:
    """Implements `_vllm_backend.Backend` on vLLM's asynchronous engine.

    `engine_args` are those of vLLM's `AsyncEngineArgs`. Raises Unavailable where vLLM is not installed or does not
    start.
    """

    def __init__(self, engine_args: Mapping[str, Any]) -> None:
        try:
            from vllm import AsyncEngineArgs, SamplingParams
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise Unavailable(
                f"vLLM cannot be loaded ({error})",
                hint='run `pip install "xpert-toolkit[vllm]"`, or give base-url of a vLLM server',
            ) from None
        self._params, self._lora, self._delta = SamplingParams, LoRARequest, RequestOutputKind.DELTA
        self._structured = StructuredOutputsParams
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xpert-vllm", daemon=True)
        self._thread.start()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))

        try:
            self._engine = self._wait(start())
        except Exception as error:  # vLLM raises of every kind when it cannot start
            self._stop_loop()
            raise Unavailable(f"vLLM does not start: {error}", where=str(engine_args.get("model"))) from error
        self._count = 0
        self._lock = threading.Lock()

    @property
    def context(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def load(self, adapter: Served) -> None:
        try:
            known = self._wait(self._engine.list_loras())
            if adapter.id not in known and not self._wait(self._engine.add_lora(self._request(adapter))):
                raise BadInput("vLLM refuses an adapter", where=str(adapter.folder))
        except XpertError:
            raise
        except Exception as error:  # a ValueError is the adapter's fault, all else is vLLM's own trouble
            raise _error(error, f"vLLM refuses an adapter: {_words(error)}") from error

    def unload(self, adapter: Served) -> None:
        try:
            self._wait(self._engine.remove_lora(adapter.id))
        except Exception as error:  # translated by kind, as in `load`
            raise _error(error, _words(error)) from error

    def open(self, ask: Ask) -> _LocalStream:
        return _LocalStream(self, ask)

    def score(self, ask: Ask, token: int) -> float:
        told: Any = None

        async def run() -> None:
            nonlocal told
            async for output in self.generate(ask, delta=False):
                told = output.outputs[0].logprobs

        try:
            self._wait(run())
        except Exception as error:  # translated by kind, as in `load`
            raise _error(error, _words(error)) from error
        return float(told[0][token].logprob)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._engine.shutdown()
            self._stop_loop()

    def generate(self, ask: Ask, *, delta: bool) -> Any:
        """vLLM's own outputs of a request, an asynchronous iterator; leaving it early ends the request there."""
        with self._lock:
            self._count += 1
            number = self._count  # vLLM wants ids of its own: two sessions may use the same
        more: dict[str, Any] = {"output_kind": self._delta} if delta else {}
        if "structured_outputs" in ask.fields:
            more["structured_outputs"] = self._structured(**ask.fields["structured_outputs"])
        return self._engine.generate(
            {"prompt_token_ids": list(ask.prompt_ids)},
            self._params(**{**ask.fields, **more}),
            f"{number}-{ask.id}",
            lora_request=None if ask.adapter is None else self._request(ask.adapter),
        )

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Starts work on vLLM's thread; the future can be cancelled from here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.spawn(work).result()

    def _request(self, adapter: Served) -> Any:
        return self._lora(lora_name=adapter.name, lora_int_id=adapter.id, lora_path=str(adapter.folder))

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _LocalStream:
    """One reply: vLLM's thread puts its outputs into a queue."""

    def __init__(self, backend: LocalBackend, ask: Ask) -> None:
        self._backend = backend
        self._ask = ask
        self._outputs: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._future: Any = None

    def __iter__(self) -> Iterator[Chunk]:
        self._future = self._backend.spawn(self._read())
        try:
            while not self._closed.is_set():
                try:
                    found = self._outputs.get(timeout=LISTENS)
                except queue.Empty:
                    continue
                if isinstance(found, Exception):
                    raise _error(found, _words(found)) from found
                if found is None:
                    raise Unavailable("vLLM ended a reply before its end")
                yield found
                if found.finished:
                    return
        finally:
            self._future.cancel()

    def close(self) -> None:
        self._closed.set()

    async def _read(self) -> None:
        try:
            async for output in self._backend.generate(self._ask, delta=True):
                self._outputs.put(_chunk(output.outputs[0], self._ask.fields.get("logprobs")))
            self._outputs.put(None)
        except Exception as error:  # the coroutine has no caller: the reader raises it
            self._outputs.put(error)


def _chunk(output: Any, logprobs: int | None) -> Chunk:
    reason = output.finish_reason
    if reason not in (None, "stop", "length"):
        raise Unavailable(f"vLLM gave the request up ({reason})")
    tokens = tuple(int(token) for token in output.token_ids)
    if logprobs is None:
        return Chunk(tokens, (), reason)
    told = []
    for token, found in zip(tokens, output.logprobs, strict=True):
        best = sorted(((int(other), float(entry.logprob)) for other, entry in found.items()), key=lambda pair: -pair[1])
        told.append(TokenLogprob(token, float(found[token].logprob), tuple(best[:logprobs])))
    return Chunk(tokens, tuple(told), reason)


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _error(error: Exception, message: str) -> XpertError:
    """vLLM's errors: a ValueError is what it says of a request or an adapter, all else is its own trouble."""
    if isinstance(error, XpertError):
        return error
    if "max_lora_rank" in message:
        return BadInput(message, hint="raise max-lora-rank")
    return BadInput(message) if isinstance(error, ValueError) else Unavailable(message)
