"""The engine on torch: one base model in memory, and batches in which every request has its own weighted experts.

    y = W x + sum_e w_e s_e B_e A_e x          different for each row, in one pass a step, prefill and decoding alike

Greedy replies are those of plain peft for the same expert. Other requests in the batch change a reply's logits only by
the rounding of differently shaped matrix products.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from xpert.errors import BadInput, unknown
from xpert.experts.adapters import Adapter, read_adapter
from xpert.experts.engines._continuations import continuation_logprobs
from xpert.experts.engines._lora_plan import RowExperts
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._session import Session
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest, Piece, WeightedExperts

__all__ = ["PLUGIN", "TorchEngine"]


class TorchEngine:
    """Implements `protocols.Engine` on a `LanguageModel`, whose `model` it leaves unchanged.

    `max_batch` is the number of requests in flight at once. Several sessions and threads may share an engine; their
    passes take turns. While it runs, nobody else may call the same `lm.model`.
    """

    def __init__(self, lm: LanguageModel, *, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise BadInput(f"max-batch is {max_batch}; the least is 1")
        self.lm = lm
        self.max_batch = max_batch
        self._passes = Passes(lm)
        self._adapters: dict[str, Adapter] = {}
        self._lock = threading.Lock()

    @property
    def experts(self) -> dict[str, str]:
        """Key -> content fingerprint of the experts that can be asked for."""
        with self._lock:
            return {key: adapter.fingerprint for key, adapter in self._adapters.items()}

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together that the base model can hold."""
        return self._passes.context

    def add_expert(self, key: str, folder: Path) -> None:
        """Loads the adapter in `folder` under `key`.

        A key in use with other content is replaced: requests in flight end with the adapter they began with. Raises
        BadInput (NotFound, Corrupt) where the adapter does not fit the base model or cannot be served.
        """
        adapter = read_adapter(key, Path(folder), self.lm)
        with self._lock:
            earlier = self._adapters.get(key)
            if earlier is not None and earlier.fingerprint == adapter.fingerprint:
                return
            self._adapters[key] = adapter
        if earlier is not None:
            self._passes.forget(earlier)

    def remove_expert(self, key: str) -> None:
        """Forgets an expert; requests in flight with it end as they began. Raises NotFound for an unknown key."""
        with self._lock:
            if key not in self._adapters:
                raise unknown("expert", key, self._adapters)
            adapter = self._adapters.pop(key)
        self._passes.forget(adapter)

    def session(self) -> Session:
        """A batch to be driven step by step, from a server's thread for one."""
        return Session(self._passes, self.lm.tokenizer, self._resolve, self.max_batch)

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        """Pieces of all replies as they come; `requests` is read ahead by one batch only.

        `cancelled(id)` is asked before every step; a request it names gets no more pieces. Raises BadInput or NotFound
        for a request that cannot be answered.
        """
        session = self.session()
        source = iter(requests)
        more = True
        while True:
            while more and len(session.pending) < 2 * self.max_batch:
                request = next(source, None)
                if request is None:
                    more = False
                else:
                    session.submit(request)
            if cancelled is not None:
                for request_id in session.pending:
                    if cancelled(request_id):
                        session.cancel(request_id)
            yield from session.step()
            for _, error in session.failures():
                raise error
            if not more and session.idle:
                return

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        """Log-probability of each token of one continuation per request, given its prompt and experts.

        Requests with the same prompt and experts, such as the choices of one question, share the prompt's pass.
        Sampling is not looked at. Raises BadInput for an empty prompt or continuation, and beyond the context.
        """
        experts = [self._resolve(request.experts) for request in requests]
        return continuation_logprobs(self._passes, requests, experts, continuations, self.max_batch)

    def _resolve(self, experts: WeightedExperts) -> RowExperts:
        """The adapters of a request, weights of a repeated key added up, those of weight zero left out."""
        weights: dict[str, float] = {}
        with self._lock:
            for key, weight in experts:
                if key not in self._adapters:
                    raise unknown("expert", key, self._adapters)
                if not math.isfinite(weight):
                    raise BadInput(f"the weight of expert {key!r} is {weight}", hint="weights are finite numbers")
                weights[key] = weights.get(key, 0.0) + weight
            return tuple((self._adapters[key], weight) for key, weight in sorted(weights.items()) if weight)


PLUGIN = TorchEngine
