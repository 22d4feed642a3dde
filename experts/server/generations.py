"""What is served at one moment, as an object that is exchanged whole: see docs/design/0005-routing-and-serving.md."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xpert.errors import BadInput, NotFound
from xpert.experts.aggregated import open_aggregator
from xpert.experts.mixture import Mixture, MixtureExpert
from xpert.experts.routing import MixtureRouter
from xpert.experts.server.model_names import Way, by_way
from xpert.experts.serving import MixtureRunner, open_gate
from xpert.language_model import LanguageModel
from xpert.protocols import Aggregator
from xpert.storage import hash_file, hash_json

__all__ = ["Generation", "Generations", "Routed", "served_fingerprint"]

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
    _making: dict[Way, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards the two above; nothing is computed under it

    @property
    def mixture(self) -> Mixture:
        return self.runner.mixture

    @cached_property
    def fingerprint(self) -> str:
        """See `served_fingerprint`. Every reply says it, so it is made once."""
        return served_fingerprint(self.mixture)

    def kept(self, way: Way) -> Routed | None:
        """What `by` has at hand."""
        if way == Way():
            return self.routed
        with self._lock:
            found = self._ways.get(way)
            if found is not None:
                self._ways.move_to_end(way)
            return found

    def by(self, way: Way) -> Routed:
        """Ready for a way; made at its first use, which takes the router's time to prepare. Who asks for the same way
        meanwhile waits; others do not."""
        found = self.kept(way)
        if found is not None:
            return found
        with self._lock:
            making = self._making.setdefault(way, threading.Lock())
        with making:
            found = self.kept(way)
            if found is not None:
                return found
            try:
                found = ready(by_way(self.mixture, way), seed=self.seed, device=self.device)
                with self._lock:
                    self._ways[way] = found
                    if len(self._ways) > WAYS:
                        self._ways.popitem(last=False)
            finally:
                with self._lock:
                    self._making.pop(way, None)
            return found


def served_fingerprint(mixture: Mixture) -> str:
    """Of all that decides answers and how they are asked for, but for where the files lie.

    Of an expert that is more than its weights: its settings, and what routers read of it, which the version of a
    registered one stands for and the card of one in a folder.
    """
    return hash_json(
        [
            mixture.name,
            mixture.base.fingerprint,
            [
                [
                    expert.key,
                    _engine_key(expert),
                    expert.weight,
                    expert.card.to_dict() if expert.in_folder else expert.ref,
                ]
                for expert in mixture.experts
            ],
            [mixture.router, dict(mixture.router_params)],
            mixture.router_state.fingerprint if mixture.router_state else None,
            mixture.calibration.to_dict() if mixture.calibration else None,
            mixture.aggregator.to_dict() if mixture.aggregator else None,
            [mixture.gate.name, dict(mixture.gate.params), mixture.gate.fingerprint] if mixture.gate else None,
        ]
    )


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
        keys = {expert.key: _engine_key(expert) for expert in mixture.experts}
        gate = _gate_key(number)
        if mixture.gate is not None and not hasattr(self.engine, "gates"):
            raise BadInput(
                f"this engine has no token gates, and the mixture has {mixture.gate.name}",
                hint="use --engine torch-lora, or a mixture without a gate",
            )
        with self._lock:
            self._opening = frozenset(keys.values())
        try:
            known = self.engine.experts
            for expert in mixture.experts:
                if keys[expert.key] not in known:
                    self.engine.add_expert(keys[expert.key], expert.folder)
            if mixture.gate is not None:
                self.engine.add_gate(gate, open_gate(mixture.gate, self.lm.device, keys))
            routed = ready(mixture, seed=self._seed, device=self._device)
            runner = MixtureRunner(mixture, self.lm, self.engine, routed.router, keys=keys, gate=gate)
        except BaseException:
            with self._lock:
                self._opening = frozenset()
                self._forget(set(keys.values()))
            if mixture.gate is not None:
                self.engine.remove_gate(gate)
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
            self._forget({key for one in over for key in one.runner.keys.values()})
        for one in over:
            if one.mixture.gate is not None:
                self.engine.remove_gate(_gate_key(one.number))
            log.info("generation %d (%s) is no longer served", one.number, one.mixture.name)

    def _forget(self, keys: set[str]) -> None:
        """Takes those experts out of the engine that no generation needs. Under the lock, or one that `open` has just
        found there would go; the engine does no more than strike a name from a list."""
        needed = {key for one in self._held for key in one.runner.keys.values()} | self._opening
        for key in keys - needed:
            with suppress(NotFound):
                self.engine.remove_expert(key)


def _engine_key(expert: MixtureExpert) -> str:
    """Under which no other content can stand: the weights alone do not tell a changed scale."""
    settings = expert.folder / "adapter_config.json"
    content = [expert.fingerprint, hash_file(settings) if settings.is_file() else None]
    return f"{expert.key}@{hash_json(content)[:16]}"


def _gate_key(number: int) -> str:
    return f"gate of generation {number}"
