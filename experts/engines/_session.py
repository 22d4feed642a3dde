"""Continuous batching: requests join and leave the batch between steps.

A step is one decoding pass over all rows in flight, then one prefill pass over the requests that find a place. Rows
that end leave the cache at once, and those admitted join it; the batch stays sorted by expert set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from xpert.errors import BadInput, XpertError
from xpert.experts.engines._kv_cache import RowCache, gather
from xpert.experts.engines._lora_plan import Plan, RowExperts, row_order
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._reply_text import ReplyText
from xpert.experts.engines._sampling import Chooser, check_sampling, choose
from xpert.protocols import EngineRequest, Piece, WeightedExperts

__all__ = ["Session"]

PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill pass, unless one prompt is longer; bounds memory and the wait of the others."""


@dataclass(eq=False)
class _Row:
    """A request in flight. `length` counts its tokens in the cache; `token` is the next to be fed."""

    request: EngineRequest
    experts: RowExperts
    chooser: Chooser
    text: ReplyText
    length: int = 0
    token: int = 0
    made: int = 0
    finished: str | None = None

    @property
    def id(self) -> str:
        return self.request.id


@dataclass
class _Batch:
    """The rows of one cache, sorted by expert set."""

    rows: list[_Row] = field(default_factory=list)
    cache: RowCache | None = None
    plan: Plan | None = None


class Session:
    """A batch that lives: `submit`, `step` until `idle`, `cancel` at any time.

    `submit`, `cancel`, `idle` and `pending` may be used from any thread, `step` and `failures` from one. A request
    whose logits stop being numbers leaves the batch, and `failures` says so; the others go on.
    """

    def __init__(
        self, passes: Passes, tokenizer: Any, resolve: Callable[[WeightedExperts], RowExperts], max_batch: int
    ) -> None:
        self._passes = passes
        self._tokenizer = tokenizer
        self._resolve = resolve
        self._max_batch = max_batch
        self._batch = _Batch()
        self._lock = threading.Lock()  # guards the three below
        self._waiting: list[_Row] = []
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()
        self._failures: list[tuple[str, XpertError]] = []

    def submit(self, request: EngineRequest) -> None:
        """Queues a request with the experts as they are now: a later exchange does not touch it.

        Raises BadInput for a prompt that is empty or too long, an id in use or senseless sampling, NotFound for an
        unknown expert.
        """
        where = f"request {request.id}"
        check_sampling(request.sampling, where=where)
        self._passes.check_prompt(request.prompt_ids, where=where)
        experts = self._resolve(request.experts)
        text = ReplyText(self._tokenizer, request.sampling.stop)
        row = _Row(request, experts, Chooser(request.sampling), text)
        with self._lock:
            if request.id in self._ids:
                raise BadInput("a request of this id is in flight", where=where, hint="give each request its own id")
            self._ids.add(request.id)
            self._waiting.append(row)

    def cancel(self, request_id: str) -> None:
        """Takes a request out; its place is free in the next step. Unknown and finished ids are no error."""
        with self._lock:
            if request_id in self._ids:
                self._cancelled.add(request_id)

    @property
    def pending(self) -> frozenset[str]:
        """The ids that wait or are in flight."""
        with self._lock:
            return frozenset(self._ids)

    @property
    def idle(self) -> bool:
        with self._lock:
            return not self._ids

    def failures(self) -> list[tuple[str, XpertError]]:
        """(request id, error) of the requests that failed since the last call."""
        found, self._failures = self._failures, []
        return found

    def step(self) -> list[Piece]:
        """One token for every request in flight, and the first one for those that find a place.

        An exception (out of memory, Ctrl-C) drops the requests in flight; model and session stay usable.
        """
        try:
            self._drop_cancelled()
            pieces = self._decode()
            return pieces + self._admit()
        except BaseException:
            with self._lock:
                self._ids = {row.id for row in self._waiting}
            self._batch = _Batch()
            raise

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            self._waiting = [row for row in self._waiting if row.id not in cancelled]
            self._ids -= cancelled
        if any(row.id in cancelled for row in self._batch.rows):
            self._settle([(self._batch, [row for row in self._batch.rows if row.id not in cancelled])])

    def _decode(self) -> list[Piece]:
        batch = self._batch
        if batch.cache is None:
            return []
        if batch.plan is None:
            batch.plan = self._passes.planner.make_plan([row.experts for row in batch.rows], 1)
        ids = torch.tensor([[row.token] for row in batch.rows], device=self._passes.device)
        lengths = [row.length for row in batch.rows]
        width = batch.cache.width
        logits = self._passes.forward(ids, [width - length for length in lengths], batch.plan, batch.cache)[:, -1]
        for row in batch.rows:
            row.length += 1
        pieces = self._advance(batch.rows, logits)
        if any(row.finished for row in batch.rows):
            self._settle([(batch, [row for row in batch.rows if not row.finished])])
        return pieces

    def _admit(self) -> list[Piece]:
        rows = self._choose_waiting()
        if not rows:
            return []
        rows.sort(key=lambda row: row_order(row.experts))
        joining = _Batch(rows)
        logits, joining.cache = self._passes.prefill(
            [row.request.prompt_ids for row in rows], [row.experts for row in rows]
        )
        for row in rows:
            row.length = len(row.request.prompt_ids)
        pieces = self._advance(rows, logits)
        self._settle([(self._batch, self._batch.rows), (joining, [row for row in rows if not row.finished])])
        return pieces

    def _choose_waiting(self) -> list[_Row]:
        """The oldest request, and those nearest to it in length: little padding, and nobody waits for ever."""
        with self._lock:
            places = self._max_batch - len(self._batch.rows)
            if not self._waiting or places <= 0:
                return []
            length = len(self._waiting[0].request.prompt_ids)

            def distance(row: _Row) -> int:
                return abs(len(row.request.prompt_ids) - length)

            chosen: list[_Row] = []
            longest = 0
            for row in [self._waiting[0], *sorted(self._waiting[1:], key=distance)][:places]:
                longest = max(longest, len(row.request.prompt_ids))
                if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                    break
                chosen.append(row)
            taken = set(map(id, chosen))
            self._waiting = [row for row in self._waiting if id(row) not in taken]
            return chosen

    def _advance(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[Piece]:
        """Chooses each row's next token, and says what can be said."""
        pieces = []
        for row, token in zip(rows, choose(logits, [row.chooser for row in rows]), strict=True):
            if token < 0:
                row.finished = "failed"
                self._failures.append((row.id, _not_numbers(row.request)))
                continue
            row.token = token
            row.made += 1
            text = self._say(row)
            if text or row.finished:
                piece = Piece(row.id, text)
                if row.finished:
                    piece = replace(
                        piece,
                        finished=row.finished,
                        prompt_tokens=len(row.request.prompt_ids),
                        completion_tokens=row.made,
                    )
                pieces.append(piece)
        with self._lock:
            self._ids.difference_update(row.id for row in rows if row.finished)
        return pieces

    def _say(self, row: _Row) -> str:
        if row.token in self._passes.ends:
            row.finished = "stop"
            return row.text.finish()
        text = row.text.add(row.token)
        full = row.length + 1 >= self._passes.context
        if not row.text.stopped and (row.made >= row.request.sampling.max_tokens or full):
            text += row.text.finish()
            row.finished = "length"
        if row.text.stopped:
            row.finished = "stop"
        return text

    def _settle(self, parts: Sequence[tuple[_Batch, list[_Row]]]) -> None:
        """Makes one batch of the rows that stay."""
        places = []
        for batch, staying in parts:
            index = {id(row): place for place, row in enumerate(batch.rows)}
            places += [(row, batch.cache, index[id(row)]) for row in staying]
        places.sort(key=lambda place: row_order(place[0].experts))
        rows = [row for row, _, _ in places]
        if not rows:
            self._batch = _Batch()
        elif len(parts) == 2 and not parts[1][1]:
            pass  # nothing joined: all ended with their first token
        elif len(parts) == 2 and not parts[0][1] and len(rows) == len(parts[1][0].rows):
            self._batch = parts[1][0]  # all rows are new: their cache is the batch's
        else:
            width = max(row.length for row in rows)
            sources = [(cache, place) for _, cache, place in places if cache is not None]
            self._batch = _Batch(rows, gather(sources, width, self._passes.config))


def _not_numbers(request: EngineRequest) -> XpertError:
    experts = ", ".join(key for key, _ in request.experts) or "the base model alone"
    return BadInput(
        f"the model's output is not a number with {experts}",
        where=f"request {request.id}",
        hint="lower the experts' weights, or use float32",
    )
