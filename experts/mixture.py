"""Mixtures: a named set of experts of one base model and the router in front of them. Nothing here imports torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.calibration import Calibration
from xpert.experts.routable import routable_expert
from xpert.protocols import RoutableExpert
from xpert.registry.card import BaseModel, ExpertCard
from xpert.storage import hash_file

if TYPE_CHECKING:
    from xpert.registry.versions import Version

__all__ = [
    "BASE",
    "SCHEMA",
    "AggregatorChoice",
    "GateChoice",
    "Mixture",
    "MixtureExpert",
    "StateFile",
    "aggregator_options",
    "assemble",
    "check_one_base",
    "gate_options",
    "is_path",
    "is_url",
    "open_expert",
    "router_options",
]

SCHEMA = 3
WEIGHTS_FILE = "adapter_model.safetensors"
BASE = "base"
"""The name under which the base model alone is asked for."""


class ExpertStore(Protocol):
    """The part of `registry.store.Registry` that mixtures need."""

    @property
    def location(self) -> str: ...

    def resolve(self, ref: str) -> Version: ...

    def pull(self, ref: str) -> Path: ...


@dataclass(frozen=True)
class MixtureExpert:
    """One expert of a mixture: its key there, where it comes from, the sha256 of its weights, and its folder here.

    `weight` scales the share it gets wherever a route holds several experts.
    """

    key: str
    ref: str
    fingerprint: str
    folder: Path = field(compare=False)
    weight: float = 1.0

    @cached_property
    def card(self) -> ExpertCard:
        return ExpertCard.read(self.folder)

    @property
    def in_folder(self) -> bool:
        """Whether it is of no registry, so that its content may change where it lies."""
        return is_path(self.ref)

    def routable(self) -> RoutableExpert:
        """What routers may know of it."""
        return routable_expert(self.key, self.folder, self.card)


@dataclass(frozen=True)
class GateChoice:
    """The token gate of a mixture: a plug-in with its parameters, and the file of its router where it has learned one.

    `fingerprint` is the file's sha256.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = field(default=None, compare=False)
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        gate_options(self.name, self.params)

    def to_dict(self, *, anchor: Path) -> dict[str, Any]:
        file = portable(str(self.file.resolve()), anchor) if self.file is not None else None
        return {"name": self.name, "params": dict(self.params), "file": file, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class StateFile:
    """The file of what a router has learned, and its sha256."""

    file: Path = field(compare=False)
    fingerprint: str

    def to_dict(self, *, anchor: Path) -> dict[str, Any]:
        return {"file": portable(str(self.file.resolve()), anchor), "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class AggregatorChoice:
    """Makes one reply of the replies of all experts that a prompt is routed to; each then answers by itself."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        aggregator_options(self.name, self.params)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "params": dict(self.params)}


@dataclass(frozen=True)
class Mixture:
    """Experts of one base and their router; all folders are at hand and checked.

    Behind a `gate`, the router names the experts that a prompt may use, and the gate weighs them token by token.
    `router_state` is what a learned router knows; `calibration` turns its scores into chances, and may send prompts
    with too low a chance to the base. With an `aggregator`, each expert of a route answers by itself.
    """

    name: str
    base: BaseModel
    experts: tuple[MixtureExpert, ...]
    router: str
    router_params: Mapping[str, Any] = field(default_factory=dict)
    registry: str | None = None
    recruited: Sequence[Mapping[str, Any]] = ()
    created: str = ""
    gate: GateChoice | None = None
    router_state: StateFile | None = None
    calibration: Calibration | None = None
    aggregator: AggregatorChoice | None = None

    def __post_init__(self) -> None:
        counts = Counter(expert.key for expert in self.experts)
        for key, count in counts.items():
            if count > 1:
                raise BadInput(f"two experts of the mixture are called {key!r}", hint="name one of them only")
            if key in (BASE, self.name):
                raise BadInput(f"an expert may not be called {key!r}: that name means something else here")
        router_options(self.router, self.router_params)
        if self.gate is not None and self.aggregator is not None:
            raise BadInput(
                f"gate {self.gate.name} and aggregator {self.aggregator.name} exclude each other: a gate mixes the "
                "experts at every token, and an aggregator lets each answer by itself",
                hint="leave one of them out",
            )

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(expert.key for expert in self.experts)

    def to_dict(self, *, anchor: Path) -> dict[str, Any]:
        """The content of a mixture file that will lie in the folder `anchor`."""
        return {
            "kind": "mixture",
            "schema": self._schema,
            "name": self.name,
            "base": asdict(self.base),
            "registry": self.registry and portable(self.registry, anchor),
            "experts": [
                {
                    "key": e.key,
                    "ref": portable(e.ref, anchor) if is_path(e.ref) else e.ref,
                    "fingerprint": e.fingerprint,
                    "weight": e.weight,
                }
                for e in self.experts
            ],
            "router": self.router,
            "router_params": dict(self.router_params),
            "recruited": [dict(line) for line in self.recruited],
            "created": self.created,
            **({"gate": self.gate.to_dict(anchor=anchor)} if self.gate is not None else {}),
            **({"router_state": self.router_state.to_dict(anchor=anchor)} if self.router_state is not None else {}),
            **({"calibration": self.calibration.to_dict()} if self.calibration is not None else {}),
            **({"aggregator": self.aggregator.to_dict()} if self.aggregator is not None else {}),
        }

    @property
    def _schema(self) -> int:
        """What an older xpert can read stays readable to it; what it would pass over does not."""
        if (self.router_state, self.calibration, self.aggregator) != (None, None, None):
            return SCHEMA
        return 1 if self.gate is None else 2


def aggregator_options(aggregator: str, params: Mapping[str, Any]) -> Any:
    """The aggregator's options, checked; raises BadInput naming an unknown aggregator or parameter."""
    return plugins.load("aggregator", aggregator).Options.from_mapping(params, where=f"aggregator {aggregator}")


def gate_options(gate: str, params: Mapping[str, Any]) -> Any:
    """The gate's options, checked; raises BadInput naming an unknown gate or parameter."""
    return plugins.load("gate", gate).Options.from_mapping(params, where=f"gate {gate}")


def router_options(router: str, params: Mapping[str, Any]) -> Any:
    """The router's options, checked; raises BadInput naming an unknown router or parameter."""
    return plugins.load("router", router).Options.from_mapping(params, where=f"router {router}")


def open_expert(ref: str | Path, registry: ExpertStore | None = None, *, key: str | None = None) -> MixtureExpert:
    """An expert folder, or a registered expert `owner/name[@version]`, as a member of a mixture."""
    folder = Path(ref)
    if folder.is_dir():
        card = ExpertCard.read(folder)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            raise NotFound(f"not an expert folder: it has no {WEIGHTS_FILE}", where=str(folder))
        name = key or card.name or folder.resolve().name
        return MixtureExpert(name, str(folder.resolve()), hash_file(weights), folder.resolve())
    text = str(ref)
    if registry is None or is_path(text) or "/" not in text:
        raise NotFound(
            "no such expert folder", where=text, hint="give a folder with expert.json, or OWNER/NAME of a registry"
        )
    version = registry.resolve(text)
    if version.kind != "expert":
        raise BadInput(f"{version.ref} is a {version.kind}, not an expert")
    pulled = registry.pull(version.ref)
    return MixtureExpert(key or version.name, version.ref, hash_file(pulled / WEIGHTS_FILE), pulled)


def assemble(
    experts: Sequence[MixtureExpert],
    *,
    router: str,
    router_params: Mapping[str, Any] | None = None,
    name: str = "mixture",
    registry: str | None = None,
    base: BaseModel | None = None,
    recruited: Sequence[Mapping[str, Any]] = (),
    gate: GateChoice | None = None,
    aggregator: AggregatorChoice | None = None,
) -> Mixture:
    """A mixture of experts of one base; raises BadInput naming two experts whose bases differ."""
    if not experts:
        raise BadInput("a mixture needs at least one expert", hint="train one, or publish it to the registry")
    check_one_base(experts, base)
    return Mixture(
        name=name,
        base=base or experts[0].card.base,
        experts=tuple(experts),
        router=router,
        router_params=dict(router_params or {}),
        registry=registry,
        recruited=recruited,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        gate=gate,
        aggregator=aggregator,
    )


def check_one_base(experts: Iterable[MixtureExpert], base: BaseModel | None) -> None:
    first: MixtureExpert | None = None
    for expert in experts:
        own = expert.card.base
        if base is not None and own.fingerprint != base.fingerprint:
            raise BadInput(
                f"expert {expert.key!r} belongs to base {own.ref} ({own.fingerprint[:12]}), "
                f"not to {base.ref} ({base.fingerprint[:12]})",
                hint="give --base that model, or leave the expert out",
            )
        first = first or expert
        other = first.card.base
        if own.fingerprint != other.fingerprint:
            raise BadInput(
                f"experts of different bases cannot be mixed: {first.key!r} belongs to {other.ref} "
                f"({other.fingerprint[:12]}), {expert.key!r} to {own.ref} ({own.fingerprint[:12]})",
                hint="name experts of one base only",
            )


def is_path(ref: str) -> bool:
    return ref.startswith(("/", "."))


def is_url(location: str) -> bool:
    return "://" in location


def portable(location: str, anchor: Path) -> str:
    if is_url(location):
        return location
    path = Path(location)
    return f"./{path.relative_to(anchor)}" if path.is_relative_to(anchor) else str(path)
