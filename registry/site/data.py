"""What the pages show of a registry, gathered in one pass: every name with its versions, tags, cards and users."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xpert.errors import XpertError
from xpert.progress import SILENT, Progress
from xpert.registry.card import ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.signing.signatures import fingerprint, verify
from xpert.registry.store import Details, Registry
from xpert.registry.versions import StoredFile, Version

__all__ = [
    "Catalogue",
    "Member",
    "MixtureFacts",
    "ShownName",
    "ShownVersion",
    "catalogue",
    "gather",
    "mixture_facts",
    "shown_versions",
    "sound_card",
]


@dataclass(frozen=True)
class Member:
    """One expert of a mixture: its key there, the version it is, and its weight."""

    key: str
    ref: str
    weight: float


@dataclass(frozen=True)
class MixtureFacts:
    """What a mixture says of itself; params are shown as they stand."""

    members: tuple[Member, ...]
    router: str
    router_params: Mapping[str, Any]
    gate: str = ""
    gate_params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recruited: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ShownVersion:
    """A version as the pages show it. `problem` says why its document cannot be shown, where that is so.

    `tags` are the names that point at it; `signers` who vouches for it; `used_by` the mixtures that hold it. What lies
    in a folder and not in a registry has no digest, and cannot be pulled.
    """

    version: Version
    tags: tuple[str, ...] = ()
    files: tuple[StoredFile, ...] = ()
    card: ExpertCard | None = None
    mixture: MixtureFacts | None = None
    signers: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()
    problem: str = ""

    @property
    def registered(self) -> bool:
        return bool(self.version.digest)

    @property
    def profile(self) -> SkillProfile | None:
        return self.card.profile if self.card else None


@dataclass(frozen=True)
class ShownName:
    """A name with its versions, newest first."""

    name: str
    versions: tuple[ShownVersion, ...]

    @property
    def latest(self) -> ShownVersion:
        """Where the tag `latest` points, or else the newest version."""
        return next((v for v in self.versions if "latest" in v.tags), self.versions[0])

    @property
    def kind(self) -> str:
        return self.latest.version.kind


@dataclass(frozen=True)
class Catalogue:
    """All names, sorted."""

    names: tuple[ShownName, ...]
    title: str = "Registry"

    @cached_property
    def newest(self) -> str:
        """When the newest version was made: the pages' own date, so that the same registry gives the same pages."""
        return max((v.version.created for name in self.names for v in name.versions), default="")

    @cached_property
    def problems(self) -> list[str]:
        return [f"{v.version.ref}: {v.problem}" for name in self.names for v in name.versions if v.problem]


def gather(registry: Registry, *, title: str = "Registry", progress: Progress = SILENT) -> Catalogue:
    """Reads every version's record and document, one look at the index for all; some 1 ms a version.

    A version whose record or document is damaged is shown with what ails it, and `progress` tells of it.
    """
    return catalogue(shown_versions(registry, progress=progress), title=title)


def shown_versions(registry: Registry, *, progress: Progress = SILENT) -> Iterator[ShownVersion]:
    """The versions of a registry as they stand, not yet told who uses them."""
    for version, found in registry.survey():
        entry = _shown_version(found) if isinstance(found, Details) else ShownVersion(version, problem=str(found))
        entry = _with_signers(registry, entry)
        if entry.problem:
            progress.say(f"{version.ref} is shown without its card: {entry.problem}")
        yield entry


def catalogue(versions: Iterable[ShownVersion], *, title: str = "Registry") -> Catalogue:
    """Versions under their names, each told which mixtures use it; names without tags get `latest` on the newest."""
    every = list(versions)
    users: dict[str, list[str]] = {}
    for entry in every:
        for ref in entry.version.uses:
            users.setdefault(ref, []).append(entry.version.ref)
    names: dict[str, list[ShownVersion]] = {}
    for entry in every:
        used_by = tuple(sorted(users.get(entry.version.ref, ())))
        names.setdefault(entry.version.name, []).append(dataclasses.replace(entry, used_by=used_by))
    made = []
    for name in sorted(names):
        held = sorted(names[name], key=lambda v: -v.version.version)
        if held[0].registered and not any("latest" in entry.tags for entry in held):
            held[0] = dataclasses.replace(held[0], tags=("latest", *held[0].tags))
        made.append(ShownName(name, tuple(held)))
    return Catalogue(tuple(made), title)


def _shown_version(details: Details) -> ShownVersion:
    version = details.version
    entry = ShownVersion(version, _tags(details), details.files)
    try:
        if version.kind == "mixture":
            return dataclasses.replace(entry, mixture=mixture_facts(details.document, version.uses))
        return dataclasses.replace(entry, card=sound_card(ExpertCard.from_dict(details.document, where="expert.json")))
    except XpertError as error:
        return dataclasses.replace(entry, problem=str(error))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return dataclasses.replace(entry, problem=f"its document is not of the form it should have: {error}")


def _tags(details: Details) -> tuple[str, ...]:
    return tuple(sorted(tag for tag, number in details.tags.items() if number == details.version.version))


def _with_signers(registry: Registry, entry: ShownVersion) -> ShownVersion:
    """The version with who signed it, every signature checked: one that does not match is a problem, not a signer.

    Whom to trust is for each reader to say, so no trust list is asked.
    """
    version = entry.version
    try:
        signatures = registry.records.read_signatures(version.name, version.version).signatures
        if not signatures:
            return entry
        record = registry.record(version.ref)
        wrong = [fingerprint(made.key) for made in signatures if not verify(made, record)]
    except XpertError as error:
        return dataclasses.replace(entry, problem=entry.problem or f"its signatures could not be checked: {error}")
    if wrong:
        return dataclasses.replace(entry, problem=f"the signature by {wrong[0]} does not match this version")
    return dataclasses.replace(entry, signers=tuple(fingerprint(made.key) for made in signatures))


def mixture_facts(document: Mapping[str, Any], uses: Iterable[str]) -> MixtureFacts:
    """From a mixture's JSON; raises TypeError, ValueError or AttributeError where it is not of a mixture's form."""
    members = tuple(
        Member(str(entry.get("key") or ref), ref, float(entry.get("weight", 1.0)))
        for entry, ref in zip(document["experts"], uses, strict=True)
    )
    gate = document.get("gate") or {}
    return MixtureFacts(
        members,
        str(document.get("router", "")),
        dict(document.get("router_params") or {}),
        str(gate.get("name", "")),
        dict(gate.get("params") or {}),
        tuple(dict(line) for line in document.get("recruited") or ()),
    )


def sound_card(card: ExpertCard) -> ExpertCard:
    """The card, if its numbers are numbers: the pages compute with them. Raises TypeError or ValueError."""
    for part in (card.adapter, card.selection, card.training, card.licences, card.spent, card.gates):
        if not isinstance(part, Mapping):
            raise TypeError(f"{part!r:.40} stands where names and values should")
    for name, score in _scores(card.profile):
        for interval in _intervals(score):
            values = (interval.score, interval.low, interval.high, interval.n)
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                raise ValueError(f"the scores of {name[:80]!r} are not numbers")
    return card


def _scores(profile: SkillProfile | None) -> Iterator[tuple[str, SkillScore]]:
    for group in (profile.skills, profile.clusters, profile.keywords) if profile else ():
        yield from group.items()


def _intervals(score: SkillScore) -> Iterator[Interval]:
    yield from (score.expert, score.base)
    yield from (interval for interval in (score.expert_choice, score.base_choice) if interval)
    for consistency in (score.consistency, score.base_consistency):
        if consistency:
            yield from (consistency.all_right, consistency.agreement)
