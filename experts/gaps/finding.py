"""Gaps: tasks that users bring and no expert fits, ranked by how much an expert for them would serve."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpert.experts.gaps.grouping import Groups, central_first, embed_together, group
from xpert.experts.gaps.options import GapOptions
from xpert.experts.gaps.prompts import AskedPrompt, different_prompts, lacks_of_fit, shared_system, unserved
from xpert.experts.server.request_log import RequestRecord
from xpert.progress import SILENT, Progress
from xpert.protocols import Floats, RoutableExpert
from xpert.registry.skills.skill_holders import Library, holders
from xpert.registry.skills.taxonomy import Taxonomy

__all__ = ["Found", "Gap", "find_gaps"]

_EXAMPLES = 5
_VOTERS = 100
"""Central prompts of a cluster that are asked for their skill."""
_VOTED_CHARACTERS = 2000
_AGREED = 0.3
"""Share of them that must mean one skill, for the gap to be said to lie nearest to it."""


@dataclass(frozen=True)
class Gap:
    """A cluster of unserved prompts.

    prompts: different ones; requests: those that asked them; share: of all routed requests. lack: the requests' mean
    lack of fit (`prompts.lacks_of_fit`). priority: share * lack, which is the share of all routed requests that would
    be gained if an expert fitted these perfectly. score, chance: means of the best candidate's score and of the
    calibrated chance. cohesion: mean cosine of a prompt to the cluster's centroid. nearest_expert: with its mean score
    as a candidate, or its exemplars' cosine. skill: the skill of the taxonomy that most of its prompts mean, and the
    share that do. holders: experts of the registry that have it. chosen: the prompts that stand for it, the most
    central first.
    """

    slug: str
    terms: tuple[str, ...]
    prompts: int
    requests: int
    share: float
    lack: float
    priority: float
    score: float | None
    chance: float | None
    cohesion: float
    nearest_expert: tuple[str, float] | None
    skill: tuple[str, float] | None
    holders: tuple[str, ...]
    chosen: tuple[AskedPrompt, ...]

    @property
    def label(self) -> str:
        """What its prompts' skill may be called: the taxonomy's name where half of them mean it, else the slug."""
        return self.skill[0] if self.skill and self.skill[1] >= 0.5 else self.slug

    def to_dict(self) -> dict[str, Any]:
        expert, skill = self.nearest_expert, self.skill
        return {
            "slug": self.slug,
            "terms": list(self.terms),
            "prompts": self.prompts,
            "requests": self.requests,
            "share": round(self.share, 6),
            "lack": round(self.lack, 4),
            "priority": round(self.priority, 6),
            "mean_best_score": None if self.score is None else round(self.score, 4),
            "mean_chance": None if self.chance is None else round(self.chance, 4),
            "cohesion": round(self.cohesion, 4),
            "nearest_expert": None if expert is None else {"expert": expert[0], "score": round(expert[1], 4)},
            "nearest_skill": None if skill is None else {"skill": skill[0], "share": round(skill[1], 4)},
            "registry": list(self.holders),
            "examples": [prompt.text for prompt in self.chosen[:_EXAMPLES]],
        }


@dataclass(frozen=True)
class Found:
    """Gaps, the most wanted first. unserved: requests nobody serves, of `prompts` different prompts; withheld: those of
    them in clusters with too few prompts to be told of."""

    gaps: tuple[Gap, ...]
    unserved: int
    prompts: int
    withheld: int


def find_gaps(
    records: Sequence[RequestRecord],
    options: GapOptions | None = None,
    *,
    experts: Sequence[RoutableExpert] = (),
    registry: Library | None = None,
    taxonomy: Taxonomy | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Found:
    """The gaps in what the experts of a mixture can do, by its requests in order of time.

    `experts`, if given, are those there are now: the nearest to a gap is told by their exemplars where the log names no
    candidates. Cost: embedding and clustering the different unserved prompts.
    """
    options = options or GapOptions()
    routed = sum(record.routed for record in records)
    left = unserved(records, options.below)
    lacks = lacks_of_fit(records)
    prompts = different_prompts(left, lacks, near=options.near, system=shared_system(records))
    if not prompts:
        return Found((), len(left), 0, 0)
    texts = [prompt.text for prompt in prompts]
    exemplars = [(expert.key, text) for expert in experts for text in expert.exemplars]
    progress.say(f"embedding {len(texts):,} prompts that nobody serves")
    space = embed_together(
        [*texts, *(text for _, text in exemplars)], options.embedder, device=device, seed=seed, progress=progress
    )
    own, known = space[: len(texts)], space[len(texts) :]
    groups = group(texts, own, options.clusters, least=options.min_prompts, seed=seed)
    kept = [number for number in range(len(groups.terms)) if len(groups.members(number)) >= options.min_prompts]
    taxonomy = taxonomy or Taxonomy.open()
    made = [_gap(groups, number, prompts, routed, options, (exemplars, known), registry, taxonomy) for number in kept]
    ranked = sorted(made, key=lambda gap: (-gap.priority, -gap.requests, gap.chosen[0].id))
    told = sum(gap.requests for gap in ranked)
    return Found(_named(ranked), len(left), len(prompts), sum(prompt.requests for prompt in prompts) - told)


def _gap(
    groups: Groups,
    number: int,
    prompts: Sequence[AskedPrompt],
    routed: int,
    options: GapOptions,
    exemplars: tuple[Sequence[tuple[str, str]], Floats],
    registry: Library | None,
    taxonomy: Taxonomy,
) -> Gap:
    members = groups.members(number)
    mine = [prompts[index] for index in members]
    vectors = groups.embeddings[members]
    requests = sum(prompt.requests for prompt in mine)
    lack = sum(prompt.lack * prompt.requests for prompt in mine) / requests
    central = sorted(range(len(mine)), key=lambda place: -float(vectors[place] @ groups.centroids[number]))
    skill = _skill([mine[place].text for place in central[:_VOTERS]], taxonomy)
    chosen = central_first(vectors, groups.centroids[number], options.shots)
    held = holders(registry, taxonomy, skill[0]) if registry is not None and skill is not None else []
    return Gap(
        slug="",
        terms=tuple(groups.terms[number]),
        prompts=len(mine),
        requests=requests,
        share=requests / routed,
        lack=lack,
        priority=requests / routed * lack,
        score=_mean([(prompt.score, prompt.requests) for prompt in mine]),
        chance=_mean([(prompt.chance, prompt.requests) for prompt in mine]),
        cohesion=groups.cohesion(number),
        nearest_expert=_nearest_candidate(mine) or _nearest_exemplars(vectors, *exemplars),
        skill=skill,
        holders=tuple(dict.fromkeys(one.ref for one in held)),
        chosen=tuple(mine[place] for place in chosen),
    )


def _nearest_candidate(prompts: Sequence[AskedPrompt]) -> tuple[str, float] | None:
    """The expert with the best mean score over the prompts that it was a candidate for, at least half of them."""
    totals: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for prompt in prompts:
        for key, score in prompt.candidates.items():
            totals[key] += score
            counts[key] += 1
    means = {key: totals[key] / count for key, count in counts.items() if 2 * count >= len(prompts)}
    return max(means.items(), key=lambda item: (item[1], item[0])) if means else None


def _nearest_exemplars(
    vectors: Floats, exemplars: Sequence[tuple[str, str]], known: Floats
) -> tuple[str, float] | None:
    """The expert with the greatest mean, over the prompts, of the cosine to its nearest exemplar."""
    if not exemplars:
        return None
    cosines = vectors @ known.T
    keys = [key for key, _ in exemplars]
    means = {
        key: float(cosines[:, [place for place, other in enumerate(keys) if other == key]].max(axis=1).mean())
        for key in sorted(set(keys))
    }
    return max(means.items(), key=lambda item: item[1])


def _skill(texts: Sequence[str], taxonomy: Taxonomy) -> tuple[str, float] | None:
    """The skill that the most of the texts mean by their words, and their share; None where few agree."""
    votes = Counter(skills[0] for text in texts if (skills := taxonomy.expand(text[:_VOTED_CHARACTERS])))
    if not votes:
        return None
    name, count = min(votes.items(), key=lambda item: (-item[1], item[0]))
    return (name, count / len(texts)) if count >= _AGREED * len(texts) else None


def _named(gaps: Sequence[Gap]) -> tuple[Gap, ...]:
    """Each with a slug of its own, of the first three words of its terms: letters, digits and `-`."""
    taken: set[str] = set()
    named = []
    for gap in gaps:
        words = dict.fromkeys(re.findall("[a-z0-9]+", " ".join(gap.terms).lower()))
        plain = "-".join(list(words)[:3])[:60].rstrip("-") or "prompts"
        slug = next(name for name in (plain, *(f"{plain}-{n}" for n in range(2, len(gaps) + 2))) if name not in taken)
        taken.add(slug)
        named.append(replace(gap, slug=slug))
    return tuple(named)


def _mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, count) for value, count in pairs if value is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None
