"""`xpert mix`: which experts of a registry go into a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.aggregated import check_aggregator, open_aggregator
from xpert.experts.aggregators.expert import AUTO
from xpert.experts.mixture import (
    AggregatorChoice,
    GateChoice,
    Mixture,
    MixtureExpert,
    assemble,
    open_expert,
    router_options,
)
from xpert.experts.recruiting.options import RecruitOptions
from xpert.progress import SILENT, Progress
from xpert.records import Shots
from xpert.registry.card import BaseModel

if TYPE_CHECKING:
    from xpert.registry.store import Registry

__all__ = ["mix"]

_BATCH = 16
"""Requests in flight while experts are tried: those of all experts share the batches."""


def mix(
    registry: Registry,
    *,
    router: str,
    router_params: Mapping[str, Any] | None = None,
    experts: Sequence[str] | None = None,
    shots: Shots | None = None,
    recruiting: RecruitOptions | None = None,
    gate: GateChoice | None = None,
    aggregator: AggregatorChoice | None = None,
    base: str | None = None,
    name: str = "mixture",
    device: str = "auto",
    progress: Progress = SILENT,
) -> Mixture:
    """Assembles a mixture of `experts` (`owner/name[@version]` or expert folders), or of all experts of the registry
    that belong to `base`, in their latest versions. With `shots`, of the group of them that `recruit` chooses.

    Of all experts, those that the router could never choose, since they lack what it goes by, stay out. Raises BadInput
    where such an expert is named, where the experts belong to different bases, for options of recruiting without
    shots, or for an aggregator that the router gives nothing to do; NotFound where an expert does not exist.
    """
    if recruiting is not None and shots is None:
        raise BadInput("experts are recruited by shots, and none are given", hint="give --shots FILE")
    options = router_options(router, router_params or {})
    model = _base_model(base) if base is not None else None
    members = _named(experts, registry) if experts is not None else _all_of_base(registry, model, progress)
    members = _reachable(members, router, options, model, device, progress, named=experts is not None)
    if gate is not None:
        _check_vectors(gate, members)
    mixture = assemble(
        members,
        router=router,
        router_params=_given(options, router_params or {}),
        name=name,
        registry=registry.location,
        base=model,
        gate=gate,
        aggregator=aggregator,
    )
    _check_aggregator(mixture, device)
    if shots is None:
        return mixture
    recruited = _recruited(mixture, shots, recruiting or RecruitOptions(), device, progress)
    _check_aggregator(recruited, device)
    return recruited


def _reachable(
    members: Sequence[MixtureExpert],
    router: str,
    options: Any,
    base: BaseModel | None,
    device: str,
    progress: Progress,
    *,
    named: bool,
) -> list[MixtureExpert]:
    """The members that the router can choose; raises BadInput for one that was named, or if none is left.

    Asks the router's `lacking(options, experts)`, which says what each expert lacks that could never be reached; a
    router without it can choose every expert.
    """
    plugin = plugins.load("router", router)
    if not members or not hasattr(plugin, "lacking"):
        return list(members)
    if getattr(options, "base", "") is None:
        options = dataclasses.replace(options, base=(base or members[0].card.base).ref)
    lacking: Mapping[str, str] = plugin.lacking(options, [member.routable() for member in members], device=device)
    kept = [member for member in members if member.key not in lacking]
    without = [member for member in members if member.key in lacking]
    if without and (named or not kept):
        raise BadInput(
            f"expert {without[0].key!r} has no {lacking[without[0].key]}, which router {router} needs",
            hint=getattr(plugin, "remedy", "mix with --router fixed"),
        )
    for member in without:
        progress.say(f"out: {member.ref} has no {lacking[member.key]}, which router {router} needs")
    return kept


def _check_aggregator(mixture: Mixture, device: str) -> None:
    """Raises BadInput where the aggregator does not go with the router or the experts, unless it has yet to be chosen
    who aggregates."""
    check_aggregator(mixture)
    if mixture.aggregator is not None and mixture.aggregator.params.get("expert") != AUTO:
        open_aggregator(mixture, device=device)


def _check_vectors(gate: GateChoice, members: Sequence[MixtureExpert]) -> None:
    """Raises BadInput for an expert without the vectors that the gate knows experts by."""
    if plugins.load("gate", gate.name).learned != "expert":
        return
    vectors = "phatgoose" if gate.name == "glider" else gate.name
    for member in members:
        if vectors not in member.card.gates:
            raise BadInput(
                f"expert {member.key!r} has no {vectors} vectors, which gate {gate.name} needs",
                hint=f"make them with `xpert gate FOLDER ROWS --name {vectors}`, before it is published",
            )


def _named(refs: Sequence[str], registry: Registry) -> list[MixtureExpert]:
    """Members in the order given. Two versions of one expert get keys with their versions."""
    members = [open_expert(ref, registry) for ref in refs]
    keys = [member.key for member in members]
    return [
        open_expert(m.ref, registry, key=m.ref) if keys.count(m.key) > 1 and m.ref.startswith(f"{m.key}@") else m
        for m in members
    ]


def _all_of_base(registry: Registry, base: BaseModel | None, progress: Progress) -> list[MixtureExpert]:
    latest = [entry.latest for entry in registry.list() if entry.latest.kind == "expert"]
    if not latest:
        raise BadInput(
            "the registry holds no experts",
            where=registry.location,
            hint="publish one with `xpert registry publish`",
        )
    if base is None:
        return [open_expert(version.ref, registry) for version in latest]
    fitting = [version for version in latest if version.base_fingerprint == base.fingerprint]
    for version in latest:
        if version not in fitting:
            progress.say(f"out: {version.ref} belongs to another base ({version.base})")
    if not fitting:
        raise BadInput(
            f"no expert of the registry belongs to base {base.ref}; they belong to "
            f"{', '.join(sorted({version.base for version in latest}))}",
            where=registry.location,
        )
    return [open_expert(version.ref, registry) for version in fitting]


def _recruited(mixture: Mixture, shots: Shots, options: RecruitOptions, device: str, progress: Progress) -> Mixture:
    from xpert.experts.recruit import recruit
    from xpert.experts.serving import load_engine

    lm, engine = load_engine(mixture, device=device, max_batch=_BATCH, progress=progress)
    by_key = {expert.key: expert for expert in mixture.experts}
    folders = {key: expert.folder for key, expert in by_key.items()}
    found = recruit(lm, engine, folders, shots, options, progress=progress)
    for one in found.experts:
        progress.say(f"{'in ' if one.chosen else 'out'}: {one.key}: {one.reason}")
    progress.say(found.summary())
    return assemble(
        [by_key[key] for key in found.chosen],
        router=mixture.router,
        router_params=mixture.router_params,
        name=mixture.name,
        registry=mixture.registry,
        base=mixture.base,
        recruited=found.lines(),
        gate=mixture.gate,
        aggregator=mixture.aggregator,
    )


def _base_model(ref: str) -> BaseModel:
    from xpert.language_model import model_fingerprint

    location = str(Path(ref).resolve()) if Path(ref).exists() else ref
    return BaseModel(location, model_fingerprint(ref))


def _given(options: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that were given, in their own types, so that defaults may improve under old mixtures."""
    typed = options.to_dict()
    return {name: typed[name] for name in (key.replace("-", "_") for key in params)}
