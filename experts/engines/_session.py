"""Continuous batching: requests join and leave the batch between steps.

A step is one decoding pass over all rows in flight, then one prefill pass over the requests that find a place (two
where they share a prefix that is not computed yet). Rows that end leave the cache at once, and those admitted join
it; the batch stays sorted by gate and expert set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from xpert.errors import BadInput, XpertError
from xpert.experts.engines._bank import AdapterBank
from xpert.experts.engines._choosing import constrained, contrasted
from xpert.experts.engines._kv_cache import RowCache, gather
from xpert.experts.engines._lora_layers import Unservable
from xpert.experts.engines._lora_plan import Plan, row_order
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._prefixes import BLOCK
from xpert.experts.engines._requests import InFlight, Lane
from xpert.experts.engines._sampling import choose, token_logprobs
from xpert.experts.engines._waiting import Waiting
from xpert.protocols import EngineRequest, Piece

__all__ = ["Session"]

SPARED = 512
"""Tokens that computing a shared prefix apart must spare to be worth a pass of its own."""
PAUSE = 0.05
"""Seconds that a step with nothing to compute waits for adapters on their way."""


@dataclass
class _Batch:
    """The rows of one cache, sorted by gate and expert set."""

    lanes: list[Lane] = field(default_factory=list)
    cache: RowCache | None = None
    plan: Plan | None = None


class Session:
    """A batch that lives: `submit`, `step` until `idle`, `cancel` at any time.

    `submit`, `cancel`, `idle` and `pending` may be used from any thread, `step` and `failures` from one. A request
    whose logits stop being numbers, whose adapters cannot be loaded or whose constraint becomes too costly, leaves, and
    `failures` says so; the others go on.
    """

    def __init__(
        self, passes: Passes, bank: AdapterBank, prepare: Callable[[EngineRequest], InFlight], max_batch: int
    ) -> None:
        self._passes = passes
        self._bank = bank
        self._prepare = prepare
        self._max_batch = max_batch
        self._batch = _Batch()
        self._lock = threading.Lock()  # guards the three below
        self._waiting = Waiting(bank, self._fresh)
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()
        self._failures: list[tuple[str, XpertError]] = []

    def submit(self, request: EngineRequest) -> None:
        """Queues a request with the experts as they are now: a later exchange does not touch it.

        Raises BadInput for a prompt that is empty or too long, an id in use, senseless sampling or a constraint that
        cannot be followed, NotFound for an unknown expert, gate or decoder, Unavailable where a constraint needs a
        library that is missing. A constraint that is new costs the caller its grammar (see `Grammars`).
        """
        prepared = self._prepare(request)
        if len(prepared.lanes) > self._max_batch:
            raise BadInput(
                f"a contrast takes {len(prepared.lanes)} rows of the batch, which has {self._max_batch}",
                where=f"request {request.id}",
                hint="raise max-batch",
            )
        with self._lock:
            if request.id in self._ids:
                raise BadInput(
                    "a request of this id is in flight",
                    where=f"request {request.id}",
                    hint="give each request its own id",
                )
            self._ids.add(request.id)
            self._waiting.add(prepared)
            self._waiting.fetch_ahead()
        for lane in prepared.lanes:
            self._passes.prefixes.sight(lane.chain)

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
    def running(self) -> int:
        """Rows in the batch; the other requests wait for a place."""
        return len(self._batch.lanes)

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

        Where all that wait need adapters still on their way, it waits a moment for them. An exception (out of memory,
        Ctrl-C) drops the requests in flight; model and session stay usable.
        """
        joining: list[InFlight] = []
        try:
            self._drop_cancelled()
            pieces = self._decode()
            joining = self._choose()
            pieces += self._admit(joining)
        except BaseException:
            self._abandon(joining)
            raise
        if not self._batch.lanes and not pieces:
            self._pause()
        return pieces

    def close(self) -> None:
        """Lets go of all that waits and runs."""
        with self._lock:
            self._waiting.drop(set(self._ids))
        self._abandon([])

    def _abandon(self, joining: Sequence[InFlight]) -> None:
        for request in {id(lane.of): lane.of for lane in self._batch.lanes}.values():
            self._let_go(request)
        for request in joining:
            self._let_go(request)
        with self._lock:
            self._ids = {request.id for request in self._waiting.requests}
            self._cancelled &= self._ids
        self._batch = _Batch()

    def _let_go(self, request: InFlight) -> None:
        self._waiting.give_back(request)

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            self._waiting.drop(cancelled)
            self._ids -= cancelled
        if any(lane.of.id in cancelled for lane in self._batch.lanes):
            for lane in self._batch.lanes:
                if lane.of.id in cancelled:
                    self._let_go(lane.of)
            self._settle([(self._batch, [lane for lane in self._batch.lanes if lane.of.id not in cancelled])])

    def _decode(self) -> list[Piece]:
        batch = self._batch
        if batch.cache is None:
            return []
        if batch.plan is None:
            batch.plan = self._passes.planner.make_plan([lane.mixture for lane in batch.lanes], 1)
        ids = torch.tensor([[lane.of.token] for lane in batch.lanes], device=self._passes.device)
        width = batch.cache.width
        pads = [width - lane.length for lane in batch.lanes]
        logits = self._passes.forward(ids, pads, batch.plan, batch.cache)[:, -1]
        for lane in batch.lanes:
            lane.length += 1
        pieces = self._advance(batch.lanes, logits)
        if any(lane.of.finished for lane in batch.lanes):
            self._settle([(batch, [lane for lane in batch.lanes if not lane.of.finished])])
        return pieces

    def _choose(self) -> list[InFlight]:
        """Who joins in this step; those whose adapters or gates fail are told off."""
        with self._lock:
            self._waiting.fetch_ahead()
            chosen = self._waiting.choose(self._max_batch - len(self._batch.lanes))
            failed, self._waiting.failed = self._waiting.failed, []
        for request, error in failed:
            self._fail(request, error)
        return [request for request in chosen if self._ready(request)]

    def _ready(self, request: InFlight) -> bool:
        handles = request.handles
        try:
            for lane in request.lanes:
                if request.lease is not None:
                    lane.mixture = lane.asked.with_adapters(request.lease, handles)
                self._passes.planner.check(lane.mixture)
        except XpertError as error:
            self._fail(request, error)
            return False
        return True

    def _fail(self, request: InFlight, error: XpertError) -> None:
        request.finished = "failed"
        self._failures.append((request.id, error))
        self._let_go(request)
        self._forget([request])

    def _forget(self, ended: Sequence[InFlight]) -> None:
        """Their ids may be used again, which a cancellation that came late must not meet."""
        with self._lock:
            self._ids.difference_update(request.id for request in ended)
            self._cancelled &= self._ids

    def _admit(self, requests: Sequence[InFlight]) -> list[Piece]:
        while True:
            try:
                return self._join(requests)
            except Unservable as error:
                blamed = [request for request in requests if _adapts(request, error.module)]
                if not blamed:
                    raise
                for request in blamed:
                    self._fail(request, error)
                requests = [request for request in requests if request not in blamed]

    def _join(self, requests: Sequence[InFlight]) -> list[Piece]:
        lanes = sorted((lane for request in requests for lane in request.lanes), key=lambda x: row_order(x.mixture))
        if not lanes:
            return []
        joining = _Batch(lanes)
        heads = self._begun(lanes)
        logits, joining.cache = self._passes.prefill(
            [lane.prompt for lane in lanes], [lane.mixture for lane in lanes], heads
        )
        for row, (lane, head) in enumerate(zip(lanes, heads, strict=True)):
            lane.length = len(lane.prompt)
            self._keep(lane, head, joining.cache, row)
        pieces = self._advance(lanes, logits)
        staying = [lane for lane in lanes if not lane.of.finished]
        self._settle([(self._batch, self._batch.lanes), (joining, staying)])
        return pieces

    # ── shared prefixes ──────────────────────────────────────────────────────────────────────────────────────────

    def _fresh(self, request: InFlight) -> int:
        """Prompt tokens that no kept prefix spares."""
        known = self._passes.prefixes.known
        return max(len(lane.prompt) - known(lane.asked.identity, lane.prompt, lane.chain) for lane in request.lanes)

    def _find(self, lane: Lane) -> RowCache | None:
        return self._passes.prefixes.find(lane.asked.identity, lane.prompt, lane.chain) if lane.chain else None

    def _begun(self, lanes: Sequence[Lane]) -> list[RowCache | None]:
        """What is kept of each lane's beginning, after the prefixes that several of them share are computed."""
        store = self._passes.prefixes
        heads = [self._find(lane) for lane in lanes]
        groups: dict[int, list[int]] = {}
        for row, lane in enumerate(lanes):
            count = store.shared(lane.chain)
            head = heads[row]
            if count > (head.width if head else 0):
                groups.setdefault(lane.chain[count // BLOCK - 1], []).append(row)
        groups = {block: rows for block, rows in groups.items() if len(rows) > 1}
        first = {block: lanes[rows[0]] for block, rows in groups.items()}
        counts = {block: BLOCK * (first[block].chain.index(block) + 1) for block in groups}
        if sum((len(rows) - 1) * counts[block] for block, rows in groups.items()) < SPARED:
            return heads
        order = sorted(groups, key=lambda block: row_order(first[block].mixture))
        prompts = [first[block].prompt[: counts[block]] for block in order]
        known = [heads[groups[block][0]] for block in order]
        _, cache = self._passes.prefill(prompts, [first[block].mixture for block in order], known)
        for place, block in enumerate(order):
            made = cache.part(place, cache.width - counts[block], cache.width)
            lane = first[block]
            store.put(lane.asked.identity, lane.prompt, lane.chain, made)
            for row in groups[block]:
                heads[row] = made
        return heads

    def _keep(self, lane: Lane, head: RowCache | None, cache: RowCache, row: int) -> None:
        """Keeps the lane's beginning where others had it too and it was not kept before."""
        store = self._passes.prefixes
        count = store.shared(lane.chain)
        if count > (head.width if head else 0):
            start = cache.width - len(lane.prompt)
            store.put(lane.asked.identity, lane.prompt, lane.chain, cache.part(row, start, start + count))

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, lanes: Sequence[Lane], logits: torch.Tensor) -> list[Piece]:
        """Chooses each request's next token, and says what can be said."""
        place = {id(lane): row for row, lane in enumerate(lanes)}
        requests = [lane.of for lane in lanes if lane is lane.of.lanes[0]]
        own = logits if len(requests) == len(lanes) else logits[[place[id(request.lanes[0])] for request in requests]]
        scores, failed = constrained(requests, contrasted(requests, own, logits, place), own)
        tokens = choose(scores, [request.chooser for request in requests])
        failed = {row: _not_numbers(requests[row].request) for row, token in enumerate(tokens) if token < 0} | failed
        self._tell(requests, own, tokens)
        pieces = []
        for row, request in enumerate(requests):
            try:
                if row in failed:
                    raise failed[row]
                piece = request.say(tokens[row], self._passes.ends, self._passes.context)
            except XpertError as error:
                self._fail(request, error)
                continue
            if piece is not None:
                pieces.append(piece)
        ended = [request for request in requests if request.finished]
        for request in ended:
            self._let_go(request)
        self._forget(ended)
        return pieces

    def _tell(self, requests: Sequence[InFlight], logits: torch.Tensor, tokens: Sequence[int]) -> None:
        """Adds log-probabilities to the requests that want them."""
        rows, wanted = [], []
        for row, request in enumerate(requests):
            asked = request.request.sampling.logprobs
            if asked is not None and tokens[row] >= 0:
                rows.append(row)
                wanted.append(asked)
        if rows:
            found = token_logprobs(logits[rows], [tokens[row] for row in rows], wanted)
            for row, logprob in zip(rows, found, strict=True):
                requests[row].told.append(logprob)

    # ── the batch ────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, parts: Sequence[tuple[_Batch, list[Lane]]]) -> None:
        """Makes one batch of the rows that stay."""
        places = []
        for batch, staying in parts:
            index = {id(lane): place for place, lane in enumerate(batch.lanes)}
            places += [(lane, batch.cache, index[id(lane)]) for lane in staying]
        places.sort(key=lambda place: row_order(place[0].mixture))
        lanes = [lane for lane, _, _ in places]
        if not lanes:
            self._batch = _Batch()
        elif len(parts) == 2 and not parts[1][1]:
            pass  # nothing joined: all ended with their first token
        elif len(parts) == 2 and not parts[0][1] and len(lanes) == len(parts[1][0].lanes):
            self._batch = parts[1][0]  # all rows are new: their cache is the batch's
        else:
            width = max(lane.length for lane in lanes)
            sources = [(cache, place) for _, cache, place in places if cache is not None]
            self._batch = _Batch(lanes, gather(sources, width, self._passes.config))

    def _pause(self) -> None:
        """Waits for the adapters of the oldest request, rather than to ask for them without end."""
        with self._lock:
            oldest = next(iter(self._waiting.requests), None)
        if oldest is not None and oldest.handles:
            with suppress(XpertError):  # not here yet, or failed, which the next step says
                self._bank.release(self._bank.wait(oldest.handles, timeout=PAUSE))


def _adapts(request: InFlight, module: str) -> bool:
    return any(module in adapter.modules for lane in request.lanes for adapter, _ in lane.mixture.experts)


def _not_numbers(request: EngineRequest) -> XpertError:
    experts = ", ".join(key for key, _ in request.experts) or "the base model alone"
    return BadInput(
        f"the model's output is not a number with {experts}",
        where=f"request {request.id}",
        hint="lower the experts' weights, or use float32",
    )
