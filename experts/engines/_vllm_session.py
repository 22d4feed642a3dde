"""Requests on their way through a vLLM, behind the same face as the torch engine's session.

vLLM batches by itself; here a thread per request makes its adapter, waits for it and reads its tokens, so that a
request that waits for an adapter holds up no other. Tokens become text in `step`, by the code that the torch engine
uses, which is why the pieces of both read alike.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from xpert.errors import BadInput, XpertError
from xpert.experts.engines._reply_text import ReplyText
from xpert.experts.engines._vllm_adapters import ExpertSet
from xpert.experts.engines._vllm_backend import AdapterLost, Ask, Backend, Chunk, Served, Stream
from xpert.experts.engines._vllm_store import AdapterStore
from xpert.protocols import EngineRequest, Piece, TokenLogprob

__all__ = ["Prepared", "VllmSession", "with_adapter"]

WAIT = 0.02
"""Seconds that a step waits for tokens; a server's loop looks at its inbox between steps."""


@dataclass(frozen=True)
class Prepared:
    """A checked request: its experts as they were when it came (None: the base alone), and vLLM's parameters."""

    request: EngineRequest
    experts: ExpertSet | None
    fields: Mapping[str, Any]


@dataclass(eq=False)
class _Row:
    ask: Prepared
    text: ReplyText
    made: int = 0
    over: bool = False
    stream: Stream | None = None

    @property
    def id(self) -> str:
        return self.ask.request.id


class VllmSession:
    """`submit`, `step` until `idle`, `cancel` at any time, from any thread; `step` and `failures` from one.

    At most `max_batch` requests are with vLLM at once, the others wait here in the order they came.
    """

    def __init__(
        self,
        backend: Backend,
        store: AdapterStore,
        prepare: Callable[[EngineRequest], Prepared],
        tokenizer: Any,
        ends: frozenset[int],
        max_batch: int,
    ) -> None:
        self._backend = backend
        self._store = store
        self._prepare = prepare
        self._tokenizer = tokenizer
        self._ends = ends
        self._max_batch = max_batch
        self._events: queue.SimpleQueue[tuple[_Row, Chunk | Exception]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the three below, and each row's `over` and `stream`
        self._rows: dict[str, _Row] = {}
        self._waiting: deque[_Row] = deque()
        self._running = 0
        self._failures: list[tuple[str, XpertError]] = []

    def submit(self, request: EngineRequest) -> None:
        """Takes a request with the experts as they are now: a later exchange does not touch it.

        Raises BadInput for what cannot be answered, NotFound for an unknown expert.
        """
        row = _Row(self._prepare(request), ReplyText(self._tokenizer, request.sampling.stop))
        with self._lock:
            if request.id in self._rows:
                raise BadInput(
                    "a request of this id is in flight",
                    where=f"request {request.id}",
                    hint="give each request its own id",
                )
            self._rows[request.id] = row
            self._waiting.append(row)
        self._start_next()

    def cancel(self, request_id: str) -> None:
        """Takes a request out, and has vLLM give it up. Unknown and finished ids are no error."""
        with self._lock:
            row = self._rows.pop(request_id, None)
        if row is not None:
            self._end(row)

    @property
    def pending(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._rows)

    @property
    def idle(self) -> bool:
        with self._lock:
            return not self._rows

    def failures(self) -> list[tuple[str, XpertError]]:
        """(request id, error) of the requests that failed since the last call; the others go on."""
        found, self._failures = self._failures, []
        return found

    def close(self) -> None:
        """Takes all requests out."""
        for request_id in self.pending:
            self.cancel(request_id)

    def step(self) -> list[Piece]:
        """What has come since the last step; waits a moment for the first of it."""
        pieces: list[Piece] = []
        wait = 0.0 if self.idle else WAIT
        while True:
            try:
                row, event = self._events.get(timeout=wait) if wait else self._events.get_nowait()
            except queue.Empty:
                return pieces
            wait = 0.0
            if row.over:
                continue
            if isinstance(event, Chunk):
                pieces += self._say(row, event)
                continue
            self._forget(row)
            if not isinstance(event, XpertError):
                raise event
            self._failures.append((row.id, event))

    def _start_next(self) -> None:
        with self._lock:
            while self._waiting and self._running < self._max_batch:
                row = self._waiting.popleft()
                if not row.over:
                    self._running += 1
                    threading.Thread(target=self._run, args=(row,), name=f"xpert-vllm-{row.id}", daemon=True).start()

    def _run(self, row: _Row) -> None:
        """A request's own thread: its adapter, its tokens."""
        try:
            with_adapter(self._store, row.ask.experts, lambda served: self._read(row, served))
        except Exception as error:  # the thread has no caller: `step` raises it
            self._events.put((row, error))
        finally:
            with self._lock:
                self._running -= 1
            self._start_next()

    def _read(self, row: _Row, adapter: Served | None) -> None:
        request = row.ask.request
        stream = self._backend.open(Ask(request.id, request.prompt_ids, row.ask.fields, adapter))
        with self._lock:
            if row.over:
                return
            row.stream = stream
        for chunk in stream:
            self._events.put((row, chunk))

    def _say(self, row: _Row, chunk: Chunk) -> list[Piece]:
        text, finished, said = "", None, 0
        for token in chunk.tokens:
            said += 1
            if token in self._ends:
                finished = "stop"
                text += row.text.finish()
                break
            text += row.text.add(token)
            if row.text.stopped:
                finished = "stop"
                break
        row.made += said
        if finished is None and chunk.finished is not None:
            finished = chunk.finished
            text += row.text.finish()
        tokens: tuple[TokenLogprob, ...] = chunk.logprobs[:said]
        if finished is None:
            return [Piece(row.id, text, tokens=tokens)] if text or tokens else []
        self._forget(row)
        return [Piece(row.id, text, finished, len(row.ask.request.prompt_ids), row.made, tokens)]

    def _forget(self, row: _Row) -> None:
        with self._lock:
            if self._rows.get(row.id) is row:
                del self._rows[row.id]
        self._end(row)

    def _end(self, row: _Row) -> None:
        with self._lock:
            row.over, stream = True, row.stream
        if stream is not None:
            stream.close()


def with_adapter(store: AdapterStore, experts: ExpertSet | None, work: Callable[[Served | None], None]) -> None:
    """Does `work` with the set's adapter at hand; a vLLM that was restarted meanwhile is given it again, once."""
    with nullcontext() if experts is None else store.use(experts) as served:
        try:
            work(served)
        except AdapterLost:
            assert experts is not None
            store.load_again(experts)
            try:
                work(served)
            except AdapterLost as error:
                raise BadInput(f"vLLM does not keep the adapter of {experts}: {error}") from None
