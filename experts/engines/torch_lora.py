"""The engine on torch: one base model in memory, and batches in which every request has its own weighted experts.

    y = W x + sum_e w_e s_e B_e A_e x          different for each row, in one pass a step, prefill and decoding alike

Greedy replies are those of plain peft for the same expert. Other requests in the batch change a reply's logits only by
the rounding of differently shaped matrix products.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from xpert import plugins
from xpert.config import Config, option
from xpert.embedders._pooling import mean_pooled
from xpert.errors import BadInput, unknown
from xpert.experts.engines._bank import AdapterBank, ResidencyOptions
from xpert.experts.engines._constraints import Grammars
from xpert.experts.engines._continuations import continuation_logprobs
from xpert.experts.engines._driving import drive
from xpert.experts.engines._lora_plan import GateEntry
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._prompt_logprobs import prompt_logprobs
from xpert.experts.engines._reply_text import ReplyText
from xpert.experts.engines._requests import Asked, InFlight, Lane
from xpert.experts.engines._sampling import Chooser, check_sampling
from xpert.experts.engines._session import Session
from xpert.language_model import LanguageModel
from xpert.progress import SILENT
from xpert.protocols import (
    Contrast,
    Decoder,
    EngineRequest,
    Floats,
    Gate,
    Piece,
    TokenLogprob,
    WeightedExperts,
)
from xpert.storage import hash_json

__all__ = ["PLUGIN", "TorchEngine", "TorchOptions"]


MOST_EXPERTS = 1024
"""Experts of one request. All are on the device at once, and a batch concatenates them."""
EMBED_TOKENS = 2048
"""Tokens with padding of one pass of `embed`, for which all that generate wait."""


@dataclass(frozen=True)
class TorchOptions(ResidencyOptions):
    """What experts and shared prefixes may take of the device and of the host's memory."""

    prefix_bytes: int = option(
        256 << 20, "bytes of the device for prompt prefixes that several requests share; 0 keeps none", minimum=0
    )


class TorchEngine:
    """Implements `protocols.Engine` on a `LanguageModel`, whose `model` it leaves unchanged.

    `max_batch` is the number of rows in flight at once: one for each request, two where it is contrasted. Several
    sessions and threads may share an engine; their passes take turns. While it runs, nobody else may call the same
    `lm.model`. On a limited device what is in flight holds its experts there: a generator left half read must be closed
    before the same thread asks for other experts, or it waits for itself.
    """

    Options: ClassVar[type[Config]] = TorchOptions

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_batch: int = 16,
        options: TorchOptions | None = None,
    ) -> None:
        if max_batch < 1:
            raise BadInput(f"max-batch is {max_batch}; the least is 1")
        self.lm = lm
        self.max_batch = max_batch
        self.options = options or TorchOptions()
        self._largest = float(torch.finfo(lm.dtype).max)
        # Concatenations of the experts of a batch may take as much again as the experts themselves.
        limit = self.options.device_bytes
        self._passes = Passes(lm, prefix_bytes=self.options.prefix_bytes, stack_bytes=limit)
        self._bank = AdapterBank(lm, self.options, on_evict=self._passes.forget)
        self._gates: dict[str, GateEntry] = {}
        self._gates_made = 0
        self._decoders: dict[str, Decoder] = {}
        self._grammars = Grammars(lm.tokenizer, lm.stop_ids, where=lm.ref)
        self._lock = threading.Lock()

    @property
    def experts(self) -> dict[str, str]:
        """Key -> content fingerprint of the experts that can be asked for."""
        return self._bank.experts

    @property
    def gates(self) -> frozenset[str]:
        """The gates that requests can name."""
        with self._lock:
            return frozenset(self._gates)

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together that the base model can hold."""
        return self._passes.context

    @property
    def counters(self) -> Mapping[str, int]:
        """What was spared and what it cost: adapter hits, loads, uploads, evictions and bytes; prefix hits, the tokens
        they spared, and bytes."""
        prefixes = self._passes.prefixes
        spared = {"prefix_hits": prefixes.hits, "prefix_tokens": prefixes.spared, "prefix_bytes": prefixes.bytes}
        return {**asdict(self._bank.counters), **spared}

    def add_expert(self, key: str, folder: Path, *, pinned: bool = False) -> None:
        """Registers the adapter in `folder` under `key`; `pinned` keeps it on the device.

        A key in use with other content is replaced: requests in flight end with the adapter they began with. Nobody
        waits for it. Raises BadInput (NotFound, Corrupt) where the adapter does not fit the base model or cannot be
        served.
        """
        self._bank.add(key, Path(folder), pinned=pinned)

    def remove_expert(self, key: str) -> None:
        """Forgets an expert; requests in flight with it end as they began. Raises NotFound for an unknown key."""
        self._bank.remove(key)

    def pin_expert(self, key: str) -> None:
        """Keeps an expert on the device. Raises NotFound for an unknown key, BadInput where the pins do not fit."""
        self._bank.pin(key)

    def unpin_expert(self, key: str) -> None:
        self._bank.unpin(key)

    def add_gate(self, key: str, gate: Gate) -> None:
        """Lets requests name `gate`; one of the same key is replaced, for the requests to come."""
        with self._lock:
            self._gates_made += 1
            self._gates[key] = GateEntry(key, self._gates_made, gate)

    def remove_gate(self, key: str) -> None:
        """Forgets a gate; requests in flight behind it end as they began. An unknown key is no error."""
        with self._lock:
            self._gates.pop(key, None)

    def close(self) -> None:
        """Ends the background loading and drops all experts; the base model stays as it is."""
        self._bank.close()

    def session(self) -> Session:
        """A batch to be driven step by step, from a server's thread for one."""
        return Session(self._passes, self._bank, self._prepare, self.max_batch)

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        """Pieces of all replies as they come; `requests` is read ahead by one batch only.

        `cancelled(id)` is asked before every step; a request it names gets no more pieces. Raises BadInput or NotFound
        for a request that cannot be answered.
        """
        yield from drive(self.session(), requests, read_ahead=2 * self.max_batch, cancelled=cancelled)

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        """Log-probability of each token of one continuation per request, given its prompt, experts and gate.

        Requests with the same prompt and experts, such as the choices of one question, share the prompt's pass.
        Sampling is not looked at. Raises BadInput for an empty prompt or continuation, beyond the context, and for a
        request with a contrast, which has no probabilities of its own.
        """
        asked = self._all_asked(requests)
        return continuation_logprobs(self._passes, self._bank, requests, asked, continuations, self.max_batch)

    def prompt_logprobs(self, requests: Sequence[EngineRequest], alternatives: int = 0) -> list[list[TokenLogprob]]:
        """Of each request's prompt, every token but the first with its log-probability given those before it.

        Under the request's experts and gate, with the `alternatives` likeliest tokens at each place. Sampling is not
        looked at. Memory of the logits is bounded, whatever the prompts' lengths. Raises BadInput for an empty prompt,
        beyond the context, for a negative `alternatives`, and for a request with a contrast.
        """
        if alternatives < 0:
            raise BadInput(f"alternatives is {alternatives}; the least is 0")
        asked = self._all_asked(requests)
        return prompt_logprobs(self._passes, self._bank, requests, asked, alternatives, self.max_batch)

    def embed(self, prompts: Sequence[tuple[int, ...]]) -> Floats:
        """float32 [n, d], rows of length 1: the mean of the base's last hidden states over each prompt's tokens.

        The base alone, without experts, as the embedder `lm` before it takes off a pool's mean. Batches of up to
        `EMBED_TOKENS` tokens, between which other passes may come. Raises BadInput for an empty prompt and beyond the
        context.
        """
        for place, prompt in enumerate(prompts):
            self._passes.check_prompt(prompt, where=f"prompt {place}", room=0)
        return mean_pooled(
            prompts,
            self._passes.states,
            dimensions=self.lm.model.config.get_text_config().hidden_size,
            pad=0,
            device=self.lm.device,
            progress=SILENT,
            title="embedding",
            tokens_per_batch=EMBED_TOKENS,
        )

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, request: EngineRequest) -> InFlight:
        """The request with its experts as they are now; raises BadInput or NotFound for what cannot be answered."""
        where = f"request {request.id}"
        check_sampling(request.sampling, where=where)
        prompts = [request.prompt_ids]
        asked = [self._asked(request.experts, request.gate, request.gate_bias, where=where)]
        contrast, decoder = request.contrast, None
        if contrast is not None:
            decoder = self._decoder(contrast, where=where)
            prompts.append(contrast.prompt_ids if contrast.prompt_ids is not None else request.prompt_ids)
            experts = contrast.experts if contrast.experts is not None else request.experts
            asked.append(self._asked(experts, request.gate, request.gate_bias, where=where))
        for prompt in prompts:
            self._passes.check_prompt(prompt, where=where)
        made = InFlight(
            request,
            decoder,
            Chooser(request.sampling, request.prompt_ids),
            ReplyText(self.lm.tokenizer, request.sampling.stop),
            self._grammars.guide(request.constraint, where=where) if request.constraint is not None else None,
        )
        chain = self._passes.prefixes.chain
        made.lanes = tuple(
            Lane(made, one, prompt, chain(one.identity, prompt)) for one, prompt in zip(asked, prompts, strict=True)
        )
        self._bank.fits(made.handles)
        return made

    def _all_asked(self, requests: Sequence[EngineRequest]) -> list[Asked]:
        """For scoring; raises BadInput for a contrast, which has no probabilities of its own."""
        for request in requests:
            if request.contrast is not None:
                raise BadInput("a contrast cannot be scored", where=f"request {request.id}")
        return [self._asked(r.experts, r.gate, r.gate_bias, where=f"request {r.id}") for r in requests]

    def _asked(self, experts: WeightedExperts, gate: str | None, bias: WeightedExperts, *, where: str) -> Asked:
        """Weights of a repeated key added up, those of weight zero left out. `bias` may name the experts alone."""
        weights = _summed(experts, "weight", self._largest)
        held = {key: self._bank.resolve(key) for key in weights}
        if len(held) > MOST_EXPERTS:
            raise BadInput(
                f"{len(held):,} experts are named; the most is {MOST_EXPERTS:,}",
                where=where,
                hint="let a router choose among them",
            )
        entry = self._gate(gate) if gate is not None else None
        if bias and entry is None:
            raise BadInput("a gate bias without a gate", where=where, hint="name the gate too")
        biases = _summed(bias, "gate bias", self._largest)
        for key in biases:
            if key not in weights:
                raise unknown("expert", key, weights)
        if entry is not None:
            for key, weight in weights.items():
                if weight < 0:
                    raise BadInput(
                        f"the strength of expert {key!r} is {weight}",
                        where=where,
                        hint="behind a gate the least is 0, which switches it off",
                    )
        chosen = [(key, weight) for key, weight in sorted(weights.items()) if weight]
        return Asked(
            tuple((held[key], weight) for key, weight in chosen),
            entry if chosen else None,
            tuple(biases.get(key, 0.0) for key, _ in chosen) if biases and chosen else (),
        )

    def _gate(self, key: str) -> GateEntry:
        with self._lock:
            if key not in self._gates:
                raise unknown("gate", key, self._gates)
            return self._gates[key]

    def _decoder(self, contrast: Contrast, *, where: str) -> Decoder:
        """One object for all requests with the same settings, so that they are combined together."""
        key = hash_json([contrast.decoder, dict(contrast.params)])
        with self._lock:
            if key not in self._decoders:
                plugin: Any = plugins.load("decoder", contrast.decoder)
                options = plugin.Options.from_mapping(contrast.params, where=f"decoder {contrast.decoder}")
                self._decoders[key] = plugin(options)
            decoder = self._decoders[key]
        differs = contrast.experts is not None if decoder.against == "experts" else contrast.prompt_ids is not None
        if not differs:
            what = "the experts" if decoder.against == "experts" else "the prompt"
            raise BadInput(f"decoder {contrast.decoder} needs {what} to contrast with", where=where)
        return decoder


def _summed(pairs: WeightedExperts, what: str, most: float) -> dict[str, float]:
    """The numbers of a repeated key added up; `most` is the largest that the base's dtype holds."""
    sums: dict[str, float] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0.0) + value
    for key, value in sums.items():
        if not abs(value) <= most:
            raise BadInput(
                f"the {what} of expert {key!r} is {value}", hint=f"it must be a finite number of at most {most:g}"
            )
    return sums


PLUGIN = TorchEngine
