"""The engine on vLLM, in this process or at a server: each request's weighted experts become one exact LoRA adapter.

    sum_e w_e s_e B_e A_e  =  [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]          rank r_1 + r_2 + ...

vLLM serves one adapter per request. What a request asks for is made into one when it is first asked for, named by the
sha256 of the experts' contents and weights, and kept while it is used. Token gates and contrast decoding need more
than one adapter a token and are refused by name.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.config import Config, option
from xpert.errors import BadInput, unknown
from xpert.experts.engines._driving import drive
from xpert.experts.engines._vllm_adapters import (
    Expert,
    ExpertSet,
    expert_set,
    open_reading_base,
    read_expert,
    write_set,
)
from xpert.experts.engines._vllm_backend import Ask, Backend, Served
from xpert.experts.engines._vllm_sampling import check_request, constraint_fields, sampling_fields, scoring_fields
from xpert.experts.engines._vllm_session import Prepared, VllmSession, with_adapter
from xpert.experts.engines._vllm_store import AdapterStore, AdapterUse
from xpert.progress import SILENT, Progress
from xpert.protocols import EngineRequest, Floats, Piece, TokenLogprob, WeightedExperts
from xpert.storage import cache_folder

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["PLUGIN", "VllmEngine", "VllmOptions"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for max_lora_rank."""


@dataclass(frozen=True)
class VllmOptions(Config):
    """How vLLM is reached or started. A server's API key is read from VLLM_API_KEY."""

    base_url: str | None = option(None, "a running vLLM server, as http://HOST:PORT; else vLLM runs in this process")
    model: str | None = option(None, "the base's name at the server, where it serves several")
    max_lora_rank: int = option(16, "the greatest rank of an adapter, as vLLM was started with")
    max_logprobs: int = option(20, "how many log-probabilities vLLM tells per token, as it was started with", minimum=0)
    adapters: int = option(64, "how many adapters are kept ready", minimum=1)
    adapter_gib: float = option(8.0, "GiB of adapters kept ready", minimum=0)
    adapter_folder: str | None = option(None, "where adapters are made; by default in xpert's cache folder")
    server_folder: str | None = option(None, "the path at which the server sees that folder, if it is another there")
    timeout: float = option(600.0, "seconds of a server's silence after which it counts as lost", minimum=1)
    max_loras: int = option(8, "in process: adapters in one batch", minimum=1)
    gpu_memory: float = option(0.9, "in process: the share of the GPU's memory that vLLM takes", minimum=0, maximum=1)
    tensor_parallel: int = option(1, "in process: GPUs that share the model", minimum=1)
    dtype: str = option("auto", "in process: the model's dtype, in vLLM's words")
    context: int | None = option(
        None, "in process: tokens of prompt and reply, if fewer than the model holds", minimum=2
    )
    eager: bool = option(False, "in process: no CUDA graphs: starts faster, answers slower")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lora_rank not in RANKS:
            raise BadInput(f"max-lora-rank is {self.max_lora_rank}", hint=f"vLLM takes {', '.join(map(str, RANKS))}")


class VllmEngine:
    """Implements `protocols.Engine` on vLLM; `lm` gives the base's shapes and tokenizer, and its weights are not used.

    `max_batch` is the number of requests that are with vLLM at once. `backend` is for other ways to reach a vLLM.
    """

    Options = VllmOptions

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_batch: int = 16,
        options: VllmOptions | None = None,
        backend: Backend | None = None,
    ) -> None:
        if max_batch < 1:
            raise BadInput(f"max-batch is {max_batch}; the least is 1")
        self.lm = lm
        self.max_batch = max_batch
        self.options = options or VllmOptions()
        self._reading = open_reading_base(lm)
        self._backend = backend or _open_backend(lm, max_batch, self.options)
        chosen = self.options.adapter_folder
        folder = Path(chosen).resolve() if chosen else cache_folder().resolve() / "vllm-adapters"
        self._store = AdapterStore(
            folder,
            self._backend,
            lambda experts, folder: write_set(experts, self._reading, folder),
            max_adapters=self.options.adapters,
            max_bytes=int(self.options.adapter_gib * 2**30),
            seen_as=Path(self.options.server_folder) if self.options.server_folder else folder,
        )
        self._experts: dict[str, Expert] = {}
        self._closed = False
        self._lock = threading.Lock()

    @staticmethod
    def open_base(ref: str, *, progress: Progress = SILENT) -> LanguageModel:
        """The base for this engine: shapes, tokenizer and fingerprint without the weights, which vLLM holds."""
        from xpert.experts.engines._vllm_base import open_base

        return open_base(ref, progress=progress)

    @property
    def experts(self) -> dict[str, str]:
        """Key -> content fingerprint of the experts that can be asked for."""
        with self._lock:
            return {key: expert.fingerprint for key, expert in self._experts.items()}

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together that vLLM was started for."""
        return self._backend.context

    @property
    def adapters(self) -> AdapterUse:
        """Counts of the adapters made, reused, given up and kept."""
        return self._store.counts()

    def add_expert(self, key: str, folder: Path) -> None:
        """Reads and checks the adapter in `folder`, which must stay as it is while it is served.

        A key in use with other content is replaced: requests that were taken end with the adapter they began with,
        and what is made of the new content has a new name and id. Raises BadInput (NotFound, Corrupt) where the
        adapter does not fit the base model or cannot be served.
        """
        expert = read_expert(key, Path(folder), self._reading)
        self._check_rank(expert_set([(expert, 1.0)], self.lm.fingerprint), where=str(folder))
        with self._lock:
            self._experts[key] = expert

    def remove_expert(self, key: str) -> None:
        """Forgets an expert; requests in flight with it end as they began. Raises NotFound for an unknown key."""
        with self._lock:
            if key not in self._experts:
                raise unknown("expert", key, self._experts)
            del self._experts[key]

    def add_gate(self, key: str, gate: Any) -> None:
        """Always raises BadInput: vLLM applies one adapter to all tokens of a request."""
        raise BadInput(
            f"the token gate {key!r} cannot run on vLLM, which has one adapter for all tokens of a request",
            hint="use the torch-lora engine, or a mixture without a gate",
        )

    def session(self) -> VllmSession:
        """A set of requests to be driven step by step, from a server's thread for one."""
        return VllmSession(
            self._backend, self._store, self._prepare, self.lm.tokenizer, self.lm.stop_ids, self.max_batch
        )

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        """Pieces of all replies as they come; `requests` is read ahead by one batch only.

        `cancelled(id)` is asked before every step; a request it names gets no more pieces. Raises BadInput or NotFound
        for a request that cannot be answered, Unavailable where vLLM is lost; the others are given up then, as they
        are when the caller stops reading.
        """
        yield from drive(self.session(), requests, read_ahead=2 * self.max_batch, cancelled=cancelled)

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        """Log-probability of each token of one continuation per request, given its prompt and experts.

        A request to vLLM per token of a continuation, each behind the last, so that vLLM's prefix cache holds what
        comes before. Sampling is not looked at. Raises BadInput for an empty prompt or continuation, and beyond the
        context.
        """
        if len(requests) != len(continuations):
            raise ValueError(f"{len(requests)} requests, but {len(continuations)} continuations")
        asks = []
        for request, continuation in zip(requests, continuations, strict=True):
            where = f"request {request.id}"
            if not continuation:
                raise BadInput("the continuation is empty", where=where)
            self._check_prompt(request.prompt_ids, where=where, room=len(continuation))
            self._check_prompt(continuation, where=where, room=0)
            asks.append((request, continuation, self._resolve(request.experts, where=where)))
        with ThreadPoolExecutor(self.max_batch, thread_name_prefix="xpert-vllm-score") as pool:
            return list(pool.map(lambda ask: self._score(*ask), asks))

    def prompt_logprobs(self, requests: Sequence[EngineRequest], alternatives: int = 0) -> list[list[TokenLogprob]]:
        """Always raises BadInput: vLLM's own are wrong where an adapter changes lm_head (see `scoring_fields`)."""
        del requests, alternatives
        raise BadInput(
            "log-probabilities of prompts cannot be had of vLLM with adapters (vllm-project/vllm#51594)",
            hint="use the torch-lora engine",
        )

    def embed(self, prompts: Sequence[tuple[int, ...]]) -> Floats:
        """Always raises BadInput: a vLLM that generates does not embed."""
        del prompts
        raise BadInput("a vLLM that generates does not embed", hint="use the torch-lora engine")

    def close(self) -> None:
        """Makes the vLLM forget the adapters, and ends it where it runs in this process."""
        if not self._closed:
            self._closed = True
            self._store.close()
            self._backend.close()

    def _score(self, request: EngineRequest, continuation: tuple[int, ...], experts: ExpertSet | None) -> list[float]:
        found: list[float] = []

        def work(adapter: Served | None) -> None:
            for place in range(len(found), len(continuation)):
                token = continuation[place]
                prompt = (*request.prompt_ids, *continuation[:place])
                found.append(self._backend.score(Ask(request.id, prompt, scoring_fields(token), adapter), token))

        with_adapter(self._store, experts, work)
        return found

    def _prepare(self, request: EngineRequest) -> Prepared:
        where = f"request {request.id}"
        check_request(request, max_logprobs=self.options.max_logprobs, where=where)
        self._check_prompt(request.prompt_ids, where=where)
        room = self.context - len(request.prompt_ids)
        fields = sampling_fields(request.sampling, self.lm.stop_ids, room=room) | constraint_fields(request.constraint)
        return Prepared(request, self._resolve(request.experts, where=where), fields)

    def _check_prompt(self, prompt: Sequence[int], *, where: str, room: int = 1) -> None:
        if not prompt:
            raise BadInput("the prompt is empty", where=where)
        if len(prompt) + room > self.context:
            raise BadInput(
                f"the prompt has {len(prompt):,} tokens; the context of vLLM holds {self.context:,}, "
                f"with the {room} to come",
                where=where,
                hint="shorten the prompt",
            )
        vocabulary = self.lm.model.get_input_embeddings().num_embeddings
        if not (min(prompt) >= 0 and max(prompt) < vocabulary):
            raise BadInput(
                f"the prompt holds a token outside 0..{vocabulary - 1}", where=where, hint="use the base's tokenizer"
            )

    def _resolve(self, experts: WeightedExperts, *, where: str) -> ExpertSet | None:
        """The set of a request; None where no weight is left, which is the base model alone."""
        members = []
        with self._lock:
            for key, weight in experts:
                if key not in self._experts:
                    raise unknown("expert", key, self._experts)
                if not math.isfinite(weight):
                    raise BadInput(f"the weight of expert {key!r} is {weight}", hint="weights are finite numbers")
                members.append((self._experts[key], weight))
        found = expert_set(members, self.lm.fingerprint)
        if not found.members:
            return None
        self._check_rank(found, where=where)
        return found

    def _check_rank(self, experts: ExpertSet, *, where: str) -> None:
        limit = self.options.max_lora_rank
        if experts.rank <= limit:
            return
        fitting = next((rank for rank in RANKS if rank >= experts.rank), None)
        together = "have together" if len(experts.members) > 1 else "has"
        raise BadInput(
            f"{experts} {together} rank {experts.rank}, and this vLLM takes at most {limit} (max-lora-rank)",
            where=where,
            hint=f"start vLLM with --max-lora-rank {fitting} and set max-lora-rank here to the same"
            if fitting
            else "route to fewer experts, or merge them at a lower rank",
        )


def _open_backend(lm: LanguageModel, max_batch: int, options: VllmOptions) -> Backend:
    if options.base_url is not None:
        from xpert.experts.engines._vllm_http import HttpBackend

        key = os.environ.get("VLLM_API_KEY")
        return HttpBackend(options.base_url, model=options.model, api_key=key, timeout=options.timeout)
    from xpert.experts.engines._vllm_local import LocalBackend

    arguments: dict[str, Any] = {
        "model": str(lm.folder),
        "enable_lora": True,
        "max_lora_rank": options.max_lora_rank,
        "max_loras": options.max_loras,
        "max_cpu_loras": max(options.max_loras, options.adapters),
        "max_logprobs": options.max_logprobs,
        "max_num_seqs": max_batch,
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": options.gpu_memory,
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "generation_config": "vllm",
    }
    if options.context is not None:
        arguments["max_model_len"] = options.context
    return LocalBackend(arguments)


PLUGIN = VllmEngine
