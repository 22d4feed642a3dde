"""What is served at one moment, as an object that is exchanged whole: see docs/design/0005-routing-and-serving.md."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from xpert.errors import BadInput, NotFound
from xpert.experts.aggregated import open_aggregator
from xpert.experts.mixture import Mixture
from xpert.experts.routing import MixtureRouter
from xpert.experts.server.model_names import Way, by_way
from xpert.experts.serving import MixtureRunner, open_gate
from xpert.language_model import LanguageModel
from xpert.protocols import Aggregator
from xpert.storage import hash_json

__all__ = ["Generation", "Generations", "Routed"]

log = logging.getLogger("xpert.server")

WAYS = 8
"""Routers besides the mixture's own that are kept ready, each for one way that requests asked for."""


@dataclass(frozen=True)
class Routed:
    """A mixture's way to route and to make one reply, ready for use."""

    mixture: Mixture
    router: MixtureRouter
    aggregator: Aggregator | None


@dataclass(eq=False)
class Generation:
    """One state of what is served. `runner` knows the experts by keys that no other content bears in the engine."""

    number: int
    runner: MixtureRunner
    routed: Routed
    seed: int = 0
    device: str = "auto"
    created: float = field(default_factory=time.time)
    uses: int = 0
    _ways: OrderedDict[Way, Routed] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def mixture(self) -> Mixture:
        return self.runner.mixture

    @property
    def fingerprint(self) -> str:
        """Of all that decides answers, but for the base's weights' location."""
        mixture = self.mixture
        return hash_json(
            [
                mixture.base.fingerprint,
                [[expert.key, expert.fingerprint, expert.weight] for expert in mixture.experts],
                [mixture.router, dict(mixture.router_params)],
                mixture.router_state.fingerprint if mixture.router_state else None,
                mixture.calibration.to_dict() if mixture.calibration else None,
                mixture.aggregator.to_dict() if mixture.aggregator else None,
                [mixture.gate.name, dict(mixture.gate.params), mixture.gate.fingerprint] if mixture.gate else None,
            ]
        )

    def by(self, way: Way) -> Routed:
        """Ready for a way; made at its first use, which takes the router's time to prepare."""
        if way == Way():
            return self.routed
        with self._lock:
            found = self._ways.get(way)
            if found is None:
                found = self._ways[way] = ready(by_way(self.mixture, way), seed=self.seed, device=self.device)
                if len(self._ways) > WAYS:
                    self._ways.popitem(last=False)
            self._ways.move_to_end(way)
            return found


def ready(mixture: Mixture, *, seed: int, device: str) -> Routed:
    """The mixture's router and aggregator, prepared."""
    return Routed(
        mixture,
        MixtureRouter(mixture, seed=seed, device=device),
        open_aggregator(mixture, seed=seed, device=device),
    )


class Generations:
    """The current generation, and those that requests still hold.

    `publish` exchanges what comes next; what a request holds stays as it is until it lets go, and then its adapters
    leave the engine. `open` may run in any thread beside requests, one at a time.
    """

    def __init__(self, first: Mixture, lm: LanguageModel, engine: Any, *, seed: int = 0, device: str = "auto") -> None:
        self.lm, self.engine = lm, engine
        self._seed, self._device = seed, device
        self._lock = threading.Lock()
        self._made = 0
        self.published: list[Callable[[Generation], None]] = []
        """Who is told of each new generation, on the thread that publishes it."""
        self._held: list[Generation] = []
        self._opening: frozenset[str] = frozenset()  # engine keys of a generation that is being made
        self.current = self.open(first)
        self._held.append(self.current)

    @property
    def alive(self) -> int:
        """The current one, and those that are still in use."""
        return len(self._held)

    def open(self, mixture: Mixture) -> Generation:
        """Adds the mixture's experts to the engine and prepares its router.

        Raises BadInput for a mixture of another base, and what is wrong with an expert; the engine is then as before.
        """
        if mixture.base.fingerprint != self.lm.fingerprint:
            raise BadInput(
                f"mixture {mixture.name} is of another base model, {mixture.base.ref}", hint="start the server anew"
            )
        self._made += 1
        number = self._made
        keys = {expert.key: f"{expert.key}@{expert.fingerprint[:16]}" for expert in mixture.experts}
        gate = _gate_key(number)
        if mixture.gate is not None and not hasattr(self.engine, "gates"):
            raise BadInput(
                f"this engine has no token gates, and the mixture has {mixture.gate.name}",
                hint="use --engine torch-lora, or a mixture without a gate",
            )
        added: list[str] = []
        with self._lock:
            self._opening = frozenset(keys.values())
        try:
            known = self.engine.experts
            for expert in mixture.experts:
                if keys[expert.key] not in known:
                    self.engine.add_expert(keys[expert.key], expert.folder)
                    added.append(keys[expert.key])
            if mixture.gate is not None:
                self.engine.add_gate(gate, open_gate(mixture.gate, self.lm.device, keys))
            routed = ready(mixture, seed=self._seed, device=self._device)
            runner = MixtureRunner(mixture, self.lm, self.engine, routed.router, keys=keys, gate=gate)
        except BaseException:
            with self._lock:
                self._opening = frozenset()
            self._forget(added)
            raise
        return Generation(number, runner, routed, self._seed, self._device)

    def publish(self, generation: Generation) -> None:
        """Requests from now on get this one."""
        with self._lock:
            self._held.append(generation)
            self.current = generation
            self._opening = frozenset()
        for hear in self.published:
            hear(generation)
        self._clear()

    def drop(self, generation: Generation) -> None:
        """Lets go of one that was opened and will not be served."""
        with self._lock:
            self._opening = frozenset()
            needed = {key for one in self._held for key in one.runner.keys.values()}
        self._forget([key for key in generation.runner.keys.values() if key not in needed])
        self._forget_gate(generation)

    @contextmanager
    def hold(self) -> Iterator[Generation]:
        """The current generation, kept until the end of the block."""
        with self._lock:
            generation = self.current
            generation.uses += 1
        try:
            yield generation
        finally:
            with self._lock:
                generation.uses -= 1
            if generation is not self.current:
                self._clear()

    def _clear(self) -> None:
        """Lets go of the generations that nobody holds."""
        with self._lock:
            over = [one for one in self._held if one is not self.current and not one.uses]
            self._held = [one for one in self._held if one not in over]
            needed = {key for one in self._held for key in one.runner.keys.values()} | self._opening
        for one in over:
            self._forget([key for key in one.runner.keys.values() if key not in needed])
            self._forget_gate(one)
            log.info("generation %d (%s) is no longer served", one.number, one.mixture.name)

    def _forget_gate(self, generation: Generation) -> None:
        if generation.mixture.gate is not None:
            self.engine.remove_gate(_gate_key(generation.number))

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            with suppress(NotFound):
                self.engine.remove_expert(key)


def _gate_key(number: int) -> str:
    return f"gate of generation {number}"
