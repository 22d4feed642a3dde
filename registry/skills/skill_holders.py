"""Which experts of a registry have a skill, by its taxonomy: declared, scored, or by the skills below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from xpert.registry.card import ExpertCard, SkillScore
from xpert.registry.skills.taxonomy import Taxonomy

__all__ = ["Holder", "holders"]


class Library(Protocol):
    """What is asked of a registry: its names, and a version's document."""

    def list(self) -> Any: ...

    def show(self, ref: str) -> Any: ...


@dataclass(frozen=True)
class Holder:
    """An expert (its latest version) that has a skill: by `skill`, the name it gives it, with its score if profiled.

    Where it has several skills below the one asked for, `why` says how their mean came about, or why there is none.
    """

    ref: str
    skill: str
    metric: str | None = None
    expert: float | None = None
    base: float | None = None
    n: int = 0
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def holders(registry: Library, taxonomy: Taxonomy, skill: str) -> list[Holder]:
    """The experts whose latest version has `skill` or one below it, best gain over the base first, unscored ones last.

    An expert that is scored on several skills below has a line for each and one for their mean. Cost: the index is
    read once, and the card of each expert found. Raises NotFound for a skill the taxonomy has not.
    """
    wanted = {taxonomy.lookup(skill).name, *taxonomy.descendants(taxonomy.lookup(skill).name)}
    found = []
    for entry in registry.list():
        version = entry.latest
        if version.kind != "expert":
            continue
        names = {name: taxonomy.find(name) for name in (*version.scores, *version.skills)}
        own = [name for name, known in names.items() if known is not None and known.name in wanted]
        if own:
            found += _lines(version.ref, own, _scores(registry, version), taxonomy, taxonomy.lookup(skill).name)
    return sorted(found, key=lambda held: (held.expert is None, -_gain(held), held.ref, held.skill))


def _scores(registry: Library, version: Any) -> Mapping[str, SkillScore]:
    if not version.scores:
        return {}
    profile = ExpertCard.from_dict(registry.show(version.ref).document, where=version.ref).profile
    return profile.skills if profile else {}


def _lines(ref: str, own: list[str], scores: Mapping[str, SkillScore], taxonomy: Taxonomy, skill: str) -> list[Holder]:
    lines = []
    for name in own:
        score = scores.get(name)
        lines.append(
            Holder(ref, name, score.metric, score.expert.score, score.base.score, score.expert.n)
            if score
            else Holder(ref, name, why="declared, not scored")
        )
    scored = {name: scores[name] for name in own if name in scores}
    rolled = taxonomy.roll_up(scored).get(skill) if len(scored) > 1 else None
    if rolled:
        lines.append(Holder(ref, skill, rolled.metric, rolled.expert, rolled.base, rolled.n, rolled.why))
    return lines


def _gain(held: Holder) -> float:
    return (held.expert or 0.0) - (held.base or 0.0)
