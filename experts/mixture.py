"""Mixtures: a named set of experts of one base model and the router in front of them.

    {"kind": "mixture", "schema": 1, "name": ...,
     "base": {"ref": ..., "fingerprint": ..., "architecture": ...},
     "registry": FOLDER, URL or null,
     "experts": [{"key": ..., "ref": "owner/name@2" or a path, "fingerprint": sha256 of the weights, "weight": 1.0}],
     "router": "centroid", "router_params": {...}, "recruited": [...], "created": ...}

With a token gate (schema 2) also

     "gate": {"name": "arrow", "params": {...}, "file": "./gate.safetensors" or null, "fingerprint": sha256 or null}

and, where any of these is there (schema 3),

     "router_state": {"file": "./router.safetensors", "fingerprint": sha256},        what `xpert router train` learned
     "calibration": {"scores": [...], "chances": [...], "reject_below": 0.3, ...},     of `xpert router calibrate`
     "aggregator": {"name": "majority", "params": {...}}

A path begins with `/` or `.`; one that lies beside or below the mixture file is written relative to it, so that the
folder can be moved. Nothing here imports torch.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xpert import plugins
from xpert.errors import BadInput, Corrupt, NotFound, nearest
from xpert.experts.calibration import Calibration
from xpert.experts.routable import routable_expert
from xpert.protocols import RoutableExpert
from xpert.registry.card import CARD_FILE, BaseModel, ExpertCard
from xpert.storage import check_output, hash_file, read_json, write_json

if TYPE_CHECKING:
    from xpert.registry.versions import Version

__all__ = [
    "BASE",
    "AggregatorChoice",
    "GateChoice",
    "Mixture",
    "MixtureExpert",
    "StateFile",
    "aggregator_options",
    "assemble",
    "load_mixture",
    "open_expert",
    "write_mixture",
]

SCHEMA = 3
_MOST_BYTES = 16 << 20  # of a mixture's file
MIXTURE_FILE = "mixture.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE = "base"
"""The name under which the base model alone is asked for."""


_Entry = tuple[str, str, str, float]
"""(key, ref, fingerprint, weight) of one expert in a mixture file."""


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
        file = _portable(str(self.file.resolve()), anchor) if self.file is not None else None
        return {"name": self.name, "params": dict(self.params), "file": file, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class StateFile:
    """The file of what a router has learned, and its sha256."""

    file: Path = field(compare=False)
    fingerprint: str

    def to_dict(self, *, anchor: Path) -> dict[str, Any]:
        return {"file": _portable(str(self.file.resolve()), anchor), "fingerprint": self.fingerprint}


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
            "registry": self.registry and _portable(self.registry, anchor),
            "experts": [
                {
                    "key": e.key,
                    "ref": _portable(e.ref, anchor) if _is_path(e.ref) else e.ref,
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
    if registry is None or _is_path(text) or "/" not in text:
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
    _check_one_base(experts, base)
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


def load_mixture(
    ref: str | Path, registry: ExpertStore | None = None, *, gone: Callable[[str, NotFound], None] | None = None
) -> Mixture:
    """A mixture file, a registered mixture or expert `owner/name[@version]`, or an expert folder.

    A single expert is a mixture of one behind router `fixed`. `registry` is where registered experts are looked up;
    without one, the registry that the mixture file names, or the user's where that is not on this machine: whichever
    it is, every expert's weights must be those that were mixed. With `gone`, registered experts that are no longer
    there are left out, and it is told of them (key, error). Raises NotFound for what is not there, BadInput for experts
    of different bases, Corrupt where an expert is not the one that was mixed.
    """
    path = Path(ref)
    if path.is_dir() and (path / MIXTURE_FILE).is_file() and not (path / CARD_FILE).is_file():
        path = path / MIXTURE_FILE
    if path.is_dir():
        return _of_one(open_expert(path), registry)
    if path.is_file():
        return _read(path, registry, gone=gone)
    text = str(ref)
    if _is_path(text) or "/" not in text or path.suffix == ".json":
        raise _no_such_mixture(path)
    store = registry or _registry(None)
    version = store.resolve(text)
    if version.kind == "mixture":
        return _read(store.pull(version.ref) / MIXTURE_FILE, store, name=version.name, gone=gone)
    return _of_one(open_expert(version.ref, store), store)


def write_mixture(path: Path, mixture: Mixture) -> None:
    """Writes the file whole. One that exists is kept if it says the same, else BadInput."""
    value = mixture.to_dict(anchor=path.resolve().parent)
    if path.is_file():
        found = _try_read(path)
        if found is not None and {**found, "created": ""} == {**_plain(value), "created": ""}:
            return
    check_output(path)
    write_json(path, value)


def _read(
    path: Path,
    registry: ExpertStore | None,
    *,
    name: str | None = None,
    gone: Callable[[str, NotFound], None] | None = None,
) -> Mixture:
    where = str(path)
    value = read_json(path, most=_MOST_BYTES)
    if not isinstance(value, dict) or value.get("kind") != "mixture":
        raise BadInput("not a mixture", where=where, hint="`xpert mix` writes one; an expert is given as its folder")
    if not isinstance(value.get("schema"), int):
        raise Corrupt("the mixture has no schema number", where=where)
    if value["schema"] > SCHEMA:
        raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
    if not value.get("experts"):
        raise Corrupt("the mixture lists no experts", where=where, hint="mix again with `xpert mix`")
    if name is not None:
        _check_inside(value, where)
    anchor = path.resolve().parent
    try:
        base = BaseModel(**value["base"])
        entries = [(e["key"], e["ref"], e["fingerprint"], float(e.get("weight", 1.0))) for e in value["experts"]]
        router, params = str(value["router"]), dict(value.get("router_params", {}))
        recruited, created = tuple(value.get("recruited", ())), str(value.get("created", ""))
        gate = _gate(value.get("gate"), anchor, where)
        state = _state(value.get("router_state"), anchor, where)
        calibration = Calibration.from_dict(value["calibration"]) if value.get("calibration") else None
        aggregator = _aggregator(value.get("aggregator"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"the mixture is damaged: {error!r}", where=where) from None
    recorded = value.get("registry")
    store = registry
    if store is None and any(not _is_path(ref) for _, ref, _, _ in entries):
        named = recorded if recorded is None or _is_url(recorded) else str(anchor / recorded)
        here = named is not None and (_is_url(named) or Path(named).is_dir())
        store = _registry(named if here else None)
        if not here:
            _check_present(entries, store, named, where)
    experts = []
    for entry in entries:
        try:
            experts.append(_member(entry, anchor, store, where))
        except NotFound as error:
            if gone is None or _is_path(entry[1]):
                raise
            gone(entry[0], error)
    if not experts:
        raise NotFound("none of the mixture's experts is left in the registry", where=where)
    _check_one_base(experts, base)
    located = store.location if store else recorded
    called = name or str(value.get("name") or path.stem)
    return Mixture(
        called,
        base,
        tuple(experts),
        router,
        params,
        located,
        recruited,
        created,
        gate,
        router_state=state,
        calibration=calibration,
        aggregator=aggregator,
    )


def _check_inside(value: Mapping[str, Any], where: str) -> None:
    """A registered mixture refers to registered experts and its own files, and to nothing else on this machine."""
    experts = value["experts"]
    entries = experts if isinstance(experts, list) else [None]
    refs = [entry.get("ref") if isinstance(entry, dict) else None for entry in entries]
    for name in ("gate", "router_state"):
        part = value.get(name)
        file = part.get("file") if isinstance(part, dict) else None
        if file is not None and (not isinstance(file, str) or Path(file).name != file.removeprefix("./")):
            raise Corrupt(f"its {name} is a file outside of its folder: {file!r}", where=where)
    for ref in refs:
        if not isinstance(ref, str) or _is_path(ref):
            raise Corrupt(f"refers to {ref!r}, which is no registered expert", where=where)


def _gate(value: Any, anchor: Path, where: str) -> GateChoice | None:
    if value is None:
        return None
    file = _trained(value, anchor, "gate", where) if value.get("file") else None
    return GateChoice(str(value["name"]), dict(value.get("params") or {}), file, value.get("fingerprint"))


def _state(value: Any, anchor: Path, where: str) -> StateFile | None:
    return StateFile(_trained(value, anchor, "router", where), str(value["fingerprint"])) if value is not None else None


def _aggregator(value: Any) -> AggregatorChoice | None:
    return AggregatorChoice(str(value["name"]), dict(value.get("params") or {})) if value is not None else None


def _trained(value: Mapping[str, Any], anchor: Path, what: str, where: str) -> Path:
    """The file that a part of a mixture names; raises NotFound or Corrupt where it is not the one."""
    file = anchor / str(value["file"])
    if not file.is_file():
        raise NotFound(f"the {what}'s file {value['file']} is not here", where=where)
    if hash_file(file) != value.get("fingerprint"):
        raise Corrupt(f"the {what}'s file {value['file']} is not the one that was trained", where=where)
    return file


def _check_present(entries: Iterable[_Entry], store: ExpertStore, named: str | None, where: str) -> None:
    """For a mixture from elsewhere, whose registry is not here or is not named: says so, rather than that an expert is
    unknown. A published mixture names none, since it means the registry it is in."""
    gone = f"the mixture's registry {named} is not here, and" if named else "the mixture does not say its registry, and"
    for _, ref, _, _ in entries:
        if _is_path(ref):
            continue
        try:
            store.resolve(ref)
        except NotFound:
            raise NotFound(
                f"{gone} {store.location} has no {ref}",
                where=where,
                hint="give the registry that holds its experts with --registry",
            ) from None


def _member(entry: _Entry, anchor: Path, store: ExpertStore | None, where: str) -> MixtureExpert:
    key, ref, fingerprint, weight = entry
    if not 0 < weight < float("inf"):
        raise BadInput(f"expert {key!r} has the weight {weight}; it must be above 0", where=where)
    location = str(anchor / ref) if _is_path(ref) else ref
    expert = open_expert(location, store, key=key)
    if expert.fingerprint != fingerprint:
        raise Corrupt(
            f"expert {key!r} is not the one that was mixed: the weights of {location} have changed",
            where=where,
            hint="mix again with `xpert mix`",
        )
    return replace(expert, weight=weight)


def _of_one(expert: MixtureExpert, registry: ExpertStore | None) -> Mixture:
    # A mixture and its expert may not share a name, since either can be asked for; the mixture is the common case.
    located = registry.location if registry else None
    return replace(assemble([expert], router="fixed", name=f"{expert.key}:routed", registry=located), created="")


def _check_one_base(experts: Iterable[MixtureExpert], base: BaseModel | None) -> None:
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


def _registry(location: str | None) -> ExpertStore:
    from xpert.registry.opening import open_registry

    store: ExpertStore = open_registry(location)
    return store


def _no_such_mixture(path: Path) -> NotFound:
    beside = [p.name for p in path.parent.iterdir() if _may_be_mixture(p)] if path.parent.is_dir() else []
    close = nearest(path.name, beside)
    hint = (
        f"did you mean {str(path.parent / close)!r}?"
        if close
        else "give a mixture file, OWNER/NAME, or an expert folder"
    )
    return NotFound("no such mixture or expert", where=str(path), hint=hint)


def _may_be_mixture(path: Path) -> bool:
    if path.is_dir():
        return (path / CARD_FILE).is_file() or (path / MIXTURE_FILE).is_file()
    return path.suffix == ".json" and (_try_read(path) or {}).get("kind") == "mixture"


def _is_path(ref: str) -> bool:
    return ref.startswith(("/", "."))


def _is_url(location: str) -> bool:
    return "://" in location


def _portable(location: str, anchor: Path) -> str:
    if _is_url(location):
        return location
    path = Path(location)
    return f"./{path.relative_to(anchor)}" if path.is_relative_to(anchor) else str(path)


def _try_read(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (BadInput, OSError):
        return None
    return value if isinstance(value, dict) else None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
