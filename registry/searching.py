"""Finding experts: by their words, by the skills that a request means, and by likeness of meaning.

Words match by their beginnings (SQLite's FTS5, ranked by bm25 with names counting most). The taxonomy adds experts
that have a skill which the request means, or one below it, under whatever name. With an embedder, what is closest to
the request is found too; the orders are joined by reciprocal rank (Cormack, Clarke and Büttcher 2009, k = 60).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xpert.errors import BadInput
from xpert.registry.index import Index, search_words
from xpert.registry.skills.taxonomy import Taxonomy
from xpert.registry.versions import Version

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xpert.protocols import Embedder

__all__ = ["Hit", "Query", "find", "open_fixed_embedder", "text_of"]

_FUSION = 60
_CLOSEST = 100
"""How many of the closest are looked at; farther ones are like everything else."""


@dataclass(frozen=True)
class Query:
    """What is looked for. All conditions must hold; see `Registry.search`."""

    text: str = ""
    base: str | None = None
    kind: str | None = None
    min_score: float | None = None
    limit: int | None = None
    taxonomy: Taxonomy | None = None


@dataclass(frozen=True)
class Hit:
    """A version that a search found. `skill` and `score`: its best skill among those asked for, where it has a profile;
    `similarity`: the cosine to the request, where an embedder was used; `partial`: it holds some of the words only, and
    nothing holds more."""

    version: Version
    skill: str | None = None
    score: float | None = None
    similarity: float | None = None
    partial: bool = False


def find(index: Index, query: Query, vector: NDArray[np.float32] | None, identity: str = "") -> list[Hit]:
    """The hits, best first. `vector` [d] is the request's embedding, compared with the index's of that identity."""
    words = tuple(search_words(query.text))
    asked = _skills_meant(index, query) if words else frozenset()
    found = _find(index, query, words, asked, vector, identity, every=True)
    if found or len(words) < 2 or index.search(query.text) or index.of_skills(asked):
        return found  # where something holds the words but does not meet the conditions, nothing less will do
    return [replace(hit, partial=True) for hit in _find(index, query, words, asked, None, "", every=False)]


def _find(
    index: Index,
    query: Query,
    words: tuple[str, ...],
    asked: frozenset[str],
    vector: NDArray[np.float32] | None,
    identity: str,
    *,
    every: bool,
) -> list[Hit]:
    by_words = index.search(query.text, every=every)
    by_skill = _with_skills(index, asked)
    similarity = index.closest(identity, vector) if vector is not None else {}

    def hit(version: Version) -> Hit | None:
        if not _fits(version, query):
            return None
        skill, score = _best_skill(version, words, asked)
        if query.min_score is not None and (score is None or score < query.min_score):
            return None
        return Hit(version, skill, score, similarity.get(version.ref))

    by_meaning = _closest(index, list(similarity), lambda version: hit(version) is not None)
    hits = {v.ref: found for v in (*by_words, *by_skill, *by_meaning) if (found := hit(v)) is not None}
    orders = [[version.ref for version in by_words]]
    if words:
        orders += [[version.ref for version in order] for order in (by_skill, by_meaning)]
    return [hits[ref] for ref in _fused(orders, hits)[: query.limit]]


def open_fixed_embedder(spec: str, *, device: str = "auto") -> Embedder:
    """An embedder whose vectors do not depend on what else is embedded; raises BadInput for one that must be fitted."""
    from xpert.embedding import FittedEmbedder, open_embedder

    embedder: Embedder = open_embedder(spec, device=device)
    if isinstance(embedder, FittedEmbedder):
        raise BadInput(
            f"the embedder {spec!r} learns from the texts it is given, so that its vectors change with them",
            hint="name one that comes trained: minilm, or st:NAME",
        )
    return embedder


def text_of(version: Version) -> str:
    """What of a version is embedded: its name without the owner, its description and its skills."""
    name, skills = version.name.partition("/")[2], ", ".join(version.strengths)
    spaced = (part.replace("-", " ").replace("_", " ") for part in (name, skills))
    return ". ".join(part for part in (next(spaced), version.description, next(spaced)) if part)


def _skills_meant(index: Index, query: Query) -> frozenset[str]:
    """The skills, by the names that experts give them, which the request means in the taxonomy, or which are below."""
    if query.taxonomy is None:
        return frozenset()
    meant = set(query.taxonomy.expand(query.text))
    names = {name: query.taxonomy.find(name) for name in index.skill_names()} if meant else {}
    return frozenset(name for name, skill in names.items() if skill is not None and skill.name in meant)


def _with_skills(index: Index, asked: frozenset[str]) -> list[Version]:
    """The latest versions with one of the skills, highest score first; unscored ones last."""
    found = index.of_skills(asked)
    best = {v.ref: max(v.scores.get(skill, 0.0) for skill in v.strengths if skill in asked) for v in found}
    return sorted(found, key=lambda version: (-best[version.ref], version.name))


def _closest(index: Index, refs: Sequence[str], fits: Callable[[Version], bool]) -> list[Version]:
    """Of the refs, the closest first, the first hundred that meet the conditions; without any, no others are read."""
    found: list[Version] = []
    for part in (refs[:_CLOSEST], refs[_CLOSEST:]):
        if part and len(found) < _CLOSEST:
            found += filter(fits, index.of_refs(part))
    return found[:_CLOSEST]


def _fits(version: Version, query: Query) -> bool:
    if query.kind is not None and version.kind != query.kind:
        return False
    return query.base is None or version.is_of(query.base)


def _fused(orders: Sequence[Sequence[str]], kept: Iterable[str]) -> list[str]:
    """Refs by the sum of 1 / (60 + rank) over the orders they stand in; equal ones as the first order has them."""
    kept = set(kept)
    points: dict[str, float] = {}
    for order in orders:
        for rank, ref in enumerate((ref for ref in order if ref in kept), 1):
            points[ref] = points.get(ref, 0.0) + 1 / (_FUSION + rank)
    return sorted(points, key=lambda ref: -points[ref])


@functools.lru_cache(maxsize=65536)
def _named(skill: str, words: tuple[str, ...]) -> bool:
    """Whether a word of a request begins one of the skill's; a registry has few skills, and many experts of each."""
    return any(held.startswith(word) for held in search_words(skill) for word in words)


def _best_skill(version: Version, words: tuple[str, ...], asked: frozenset[str]) -> tuple[str | None, float | None]:
    """Of the scored skills that the request names or means, or of all where it names none, the best one."""
    if not version.scores:
        return None, None
    named = [skill for skill in version.scores if skill in asked or _named(skill, words)]
    skill = max(named or version.scores, key=lambda name: version.scores[name])
    return skill, version.scores[skill]
