"""Running a mixture: routes every prompt of a batch and answers all of them in one batch of mixed experts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xpert import plugins
from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.aggregated import open_aggregator
from xpert.experts.mixture import BASE, GateChoice, Mixture, gate_options
from xpert.experts.reply import Reply
from xpert.experts.routing import MixtureRouter, route_request
from xpert.experts.row_answers import answer_aggregated, answer_in_stages
from xpert.progress import SILENT, Progress
from xpert.protocols import (
    Aggregator,
    Constraint,
    EngineRequest,
    Gate,
    Route,
    RouteRequest,
    Sampling,
    WeightedExperts,
)
from xpert.records import Message, Row

if TYPE_CHECKING:
    from xpert.experts.gate_bias import ExpertCosines
    from xpert.language_model import LanguageModel

__all__ = ["EngineChoice", "MixtureRunner", "Reply", "gate_cosines", "load_engine", "open_engine", "open_gate"]

ENGINE = "torch-lora"
GATE = "mixture"
"""The key under which the engine knows the mixture's gate."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine answers, with its parameters."""

    name: str = ENGINE
    params: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> Any:
        """Raises BadInput naming an unknown engine or parameter."""
        return plugins.load("engine", self.name).Options.from_mapping(self.params, where=f"engine {self.name}")


class MixtureRunner:
    """A mixture with its base model loaded once and all its experts in one engine.

    `engine` holds the experts already; besides `protocols.Engine` it tells its `context` (tokens of prompt and reply).
    """

    def __init__(
        self,
        mixture: Mixture,
        lm: LanguageModel,
        engine: Any,
        router: MixtureRouter,
        *,
        aggregator: Aggregator | None = None,
        keys: Mapping[str, str] | None = None,
        gate: str = GATE,
    ) -> None:
        """`keys`: key in the mixture -> the engine's, and `gate` the engine's name of the mixture's, where they differ
        since the engine holds other mixtures too. `aggregator`: the mixture's, where it is prepared already."""
        self.mixture = mixture
        self.lm = lm
        self.engine = engine
        self.router = router
        self._aggregator = aggregator
        self.keys = dict(keys) if keys is not None else {key: key for key in mixture.keys}
        self._gate = gate
        self._strength = {expert.key: expert.weight for expert in mixture.experts}
        self._cosines = gate_cosines(mixture, device=str(lm.device))

    @classmethod
    def open(
        cls,
        mixture: Mixture,
        *,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        max_batch: int = 16,
        engine: EngineChoice | None = None,
        progress: Progress = SILENT,
    ) -> MixtureRunner:
        """Prepares the router, loads the base model and every expert."""
        router = MixtureRouter(mixture, seed=seed, device=device)
        aggregator = open_aggregator(mixture, seed=seed, device=device)
        lm, opened = load_engine(
            mixture, device=device, dtype=dtype, max_batch=max_batch, engine=engine, progress=progress
        )
        return cls(mixture, lm, opened, router, aggregator=aggregator)

    def close(self) -> None:
        """Lets go of what the engine holds; nothing can be answered after."""
        self.engine.close()

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        return self.router.route(requests)

    def known(self, experts: WeightedExperts) -> Route:
        """The route of a request that names its expert itself, or the base model."""
        named = " + ".join(key for key, _ in experts) or "the base model"
        return Route(experts, (), f"the request asked for {named}")

    def engine_request(
        self,
        id: str,
        messages: Sequence[Message],
        experts: WeightedExperts,
        sampling: Sampling,
        *,
        gated: bool = True,
        tokenizer: Any = None,
        constraint: Constraint | None = None,
        where: str | None = None,
    ) -> EngineRequest:
        """A prompt in the base's chat form, with `max_tokens` cut to what the model's context still holds.

        `gated` lets the mixture's gate, if it has one, weigh the experts token by token; their weights in the route
        then say no more than that they may be used.

        Raises BadInput where the prompt alone fills the context; `where` is how the user knows it.
        """
        from xpert.language_model import encode_prompt

        ids = encode_prompt(tokenizer or self.lm.tokenizer, messages)
        prompt = RouteRequest(id, tuple(messages)).prompt
        return self.request_of_ids(id, ids, prompt, experts, sampling, gated=gated, constraint=constraint, where=where)

    def request_of_ids(
        self,
        id: str,
        ids: tuple[int, ...],
        prompt: str,
        experts: WeightedExperts,
        sampling: Sampling,
        *,
        gated: bool = True,
        constraint: Constraint | None = None,
        where: str | None = None,
    ) -> EngineRequest:
        """As `engine_request`, of a prompt that is token ids already; `prompt` is its text, for the gate's bias."""
        room = self.engine.context - len(ids)
        if room < 1:
            raise BadInput(
                f"the prompt has {len(ids):,} tokens, and the base model's context holds {self.engine.context:,}",
                where=where,
                hint="shorten it",
            )
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        if not gated or self.mixture.gate is None or not experts:
            return EngineRequest(id, ids, self._named(experts), sampling, constraint=constraint)
        strengths = tuple((key, self._strength[key]) for key, _ in experts)
        bias: WeightedExperts = ()
        if self._cosines is not None:
            bias = tuple(pair for pair in self._cosines.gate_bias([prompt])[0] if pair[0] in dict(strengths))
        return EngineRequest(
            id,
            ids,
            self._named(strengths),
            sampling,
            gate=self._gate,
            gate_bias=self._named(bias),
            constraint=constraint,
        )

    def _named(self, experts: WeightedExperts) -> WeightedExperts:
        """The experts by the engine's keys."""
        return tuple((self.keys[key], weight) for key, weight in experts)

    def answer(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        *,
        progress: Progress = SILENT,
        finished: Callable[[int, Reply], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Reply]:
        """Replies in the order of the rows. `finished(index, reply)` hears of each as it ends.

        With a seed, every row draws from its own one, made of the seed and the row's number (by default its index),
        so that its answer does not depend on its neighbours. Where a route has a second stage, first answers that are
        not sure enough are thrown away and given anew, in a second pass over all of them.
        """
        numbers = range(len(rows)) if numbers is None else numbers
        routes = self.route([route_request(row) for row in rows])
        samplings = [_own_seed(sampling, number) for number in numbers]
        if self.mixture.aggregator is not None:
            self._aggregator = self._aggregator or open_aggregator(self.mixture, device=str(self.lm.device))
            assert self._aggregator is not None
            return answer_aggregated(
                self, self._aggregator, rows, routes, samplings, progress=progress, finished=finished
            )
        return answer_in_stages(self, rows, routes, samplings, progress=progress, finished=finished)

    def experts_of_model(self, model: str) -> WeightedExperts | None:
        """What `model` of a request means: None for the routed mixture, else the expert it names, or the base's ().

        Raises NotFound with the nearest name.
        """
        from xpert.errors import unknown

        if model == self.mixture.name:
            return None
        if model == BASE:
            return ()
        if model not in self.mixture.keys:
            raise unknown("model", model, (self.mixture.name, BASE, *self.mixture.keys))
        return ((model, 1.0),)


def load_engine(
    mixture: Mixture,
    *,
    device: str,
    dtype: str = "auto",
    max_batch: int,
    engine: EngineChoice | None = None,
    progress: Progress = SILENT,
) -> tuple[LanguageModel, Any]:
    """The base model of a mixture and an engine that holds all its experts. Errors as in `open_engine`."""
    if mixture.gate is not None and not hasattr(plugins.load("engine", (engine or EngineChoice()).name), "gates"):
        raise BadInput(
            f"engine {(engine or EngineChoice()).name} has no token gates, and the mixture has {mixture.gate.name}",
            hint=f"use --engine {ENGINE}, or a mixture without a gate",
        )
    lm, opened = open_engine(
        mixture.base.ref,
        mixture.base.fingerprint,
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        engine=engine,
        progress=progress,
    )
    with progress.task("loading experts", total=len(mixture.experts)) as task:
        for expert in mixture.experts:
            opened.add_expert(expert.key, expert.folder)
            task.advance(1, expert.key)
    if mixture.gate is not None:
        opened.add_gate(GATE, open_gate(mixture.gate, lm.device))
    return lm, opened


def open_gate(choice: GateChoice, device: Any, engine_keys: Mapping[str, str] | None = None) -> Gate:
    """The gate with its learned router, if any, on `device`.

    `engine_keys`: mixture key -> the engine's, where they differ. Raises Corrupt for a router file that cannot be read.
    """
    tensors: dict[str, Any] = {}
    keys: list[str] = []
    if choice.file is not None:
        import safetensors

        try:
            with safetensors.safe_open(choice.file, "pt") as opened:
                keys = list(json.loads((opened.metadata() or {})["experts"]))
                tensors = {name: opened.get_tensor(name).to(device).float() for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise Corrupt(f"the gate's router is damaged: {error!r}", where=str(choice.file)) from None
    gate: Gate = plugins.load("gate", choice.name)(
        gate_options(choice.name, choice.params),
        tensors=tensors or None,
        experts=[engine_keys[key] if engine_keys else key for key in keys],
    )
    return gate


def gate_cosines(mixture: Mixture, *, device: str = "auto", seed: int = 0) -> ExpertCosines | None:
    """What gives requests their bias, where the mixture's gate wants one."""
    from xpert.experts.gate_bias import BiasedGate

    if mixture.gate is None:
        return None
    gate = plugins.load("gate", mixture.gate.name)(gate_options(mixture.gate.name, mixture.gate.params))
    if not isinstance(gate, BiasedGate):
        return None
    experts = [expert.routable() for expert in mixture.experts]
    return gate.request_bias(experts, base=mixture.base.ref, device=device, seed=seed)


def open_engine(
    base: str,
    fingerprint: str | None = None,
    *,
    device: str,
    dtype: str = "auto",
    max_batch: int,
    engine: EngineChoice | None = None,
    progress: Progress = SILENT,
) -> tuple[LanguageModel, Any]:
    """A base model and an engine without experts on it.

    Raises BadInput where the model's weights are not those with this fingerprint, NotFound where it has moved.
    """
    from xpert.language_model import load_model

    choice = engine or EngineChoice()
    plugin = plugins.load("engine", choice.name)
    options = choice.options()
    progress.say(f"loading {base}")
    try:
        # An engine that runs the model elsewhere reads of it what it needs.
        lm = (
            plugin.open_base(base, progress=progress)
            if hasattr(plugin, "open_base")
            else load_model(base, device=device, dtype=dtype, progress=progress)
        )
    except NotFound as error:
        if fingerprint is not None:
            error.hint = "say by --base where the base model lies now"
        raise
    if fingerprint is not None and lm.fingerprint != fingerprint:
        raise BadInput(
            f"this base model ({lm.fingerprint[:12]}) is not the one the expert was trained on ({fingerprint[:12]})",
            where=base,
            hint="restore that model, or train the expert again",
        )
    return lm, plugin(lm, max_batch=max_batch, options=options)


def _own_seed(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=(sampling.seed * 1_000_003 + number) % 2**63)
