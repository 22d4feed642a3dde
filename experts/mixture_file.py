"""A mixture's file: what it holds, reading it with all it names at hand and checked, and writing it.

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, nearest
from xpert.experts.calibration import Calibration
from xpert.experts.mixture import (
    SCHEMA,
    AggregatorChoice,
    ExpertStore,
    GateChoice,
    Mixture,
    MixtureExpert,
    StateFile,
    assemble,
    check_one_base,
    is_path,
    is_url,
    open_expert,
)
from xpert.registry.card import CARD_FILE, BaseModel
from xpert.storage import check_output, hash_file, read_json, write_json

__all__ = ["MIXTURE_FILE", "MixtureEntry", "load_mixture", "write_mixture"]

_MOST_BYTES = 16 << 20  # of a mixture's file
MIXTURE_FILE = "mixture.json"

MixtureEntry = tuple[str, str, str, float]
"""(key, ref, fingerprint, weight) of one expert in a mixture file."""


def load_mixture(
    ref: str | Path,
    registry: ExpertStore | None = None,
    *,
    gone: Callable[[MixtureEntry, NotFound], None] | None = None,
) -> Mixture:
    """A mixture file, a registered mixture or expert `owner/name[@version]`, or an expert folder.

    A single expert is a mixture of one behind router `fixed`. `registry` is where registered experts are looked up;
    without one, the registry that the mixture file names, or the user's where that is not on this machine: whichever
    it is, every expert's weights must be those that were mixed. With `gone`, registered experts that are no longer
    there are left out, and it is told of them. Raises NotFound for what is not there, BadInput for experts
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
    if is_path(text) or "/" not in text or path.suffix == ".json":
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
    gone: Callable[[MixtureEntry, NotFound], None] | None = None,
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
    if store is None and any(not is_path(ref) for _, ref, _, _ in entries):
        named = recorded if recorded is None or is_url(recorded) else str(anchor / recorded)
        here = named is not None and (is_url(named) or Path(named).is_dir())
        store = _registry(named if here else None)
        if not here:
            _check_present(entries, store, named, where)
    experts = []
    for entry in entries:
        try:
            experts.append(_member(entry, anchor, store, where))
        except NotFound as error:
            if gone is None or is_path(entry[1]):
                raise
            gone(entry, error)
    if not experts:
        raise NotFound("none of the mixture's experts is left in the registry", where=where)
    check_one_base(experts, base)
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
        if not isinstance(ref, str) or is_path(ref):
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


def _check_present(entries: Iterable[MixtureEntry], store: ExpertStore, named: str | None, where: str) -> None:
    """For a mixture from elsewhere, whose registry is not here or is not named: says so, rather than that an expert is
    unknown. A published mixture names none, since it means the registry it is in."""
    gone = f"the mixture's registry {named} is not here, and" if named else "the mixture does not say its registry, and"
    for _, ref, _, _ in entries:
        if is_path(ref):
            continue
        try:
            store.resolve(ref)
        except NotFound:
            raise NotFound(
                f"{gone} {store.location} has no {ref}",
                where=where,
                hint="give the registry that holds its experts with --registry",
            ) from None


def _member(entry: MixtureEntry, anchor: Path, store: ExpertStore | None, where: str) -> MixtureExpert:
    key, ref, fingerprint, weight = entry
    if not 0 < weight < float("inf"):
        raise BadInput(f"expert {key!r} has the weight {weight}; it must be above 0", where=where)
    location = str(anchor / ref) if is_path(ref) else ref
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


def _try_read(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (BadInput, OSError):
        return None
    return value if isinstance(value, dict) else None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
