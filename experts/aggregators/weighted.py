"""Weighted vote: an expert's vote counts as much as it is good at what is asked."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xpert.config import Config, option
from xpert.experts.aggregators._voting import (
    Ballot,
    ComparingOptions,
    alone,
    asks_of,
    members_of,
    rounded,
    vote,
)
from xpert.protocols import (
    Answer,
    Ask,
    Embedder,
    Floats,
    Question,
    RoutableExpert,
    RouteRequest,
    Verdict,
    Weigh,
    Weighed,
)

__all__ = ["PLUGIN", "WeightedAggregator", "WeightedOptions"]

_NEIGHBOURS = 3


@dataclass(frozen=True)
class WeightedOptions(ComparingOptions):
    weight: str = option(
        "nearest",
        "what a vote counts: the profile's score on the skill nearest to the question, the mean over all its skills, "
        "or the route's weight",
        choices=("nearest", "mean", "route"),
    )
    power: float = option(1.0, "exponent of the weights: above 1 the better experts count for more", minimum=0)
    embedder: str = option("lsa", "finds the nearest skill among the experts' exemplars: lsa, minilm or st:NAME")


class WeightedAggregator:
    """Every expert of the route answers by itself, and its vote counts as its profile's score on the question's skill.

    The skill is that of the three exemplars nearest to the question, among the skills that experts are profiled on.
    Where no exemplar is like it at all, an expert counts as the mean over its skills; where an expert of the route has
    no profile, all count as they weigh in the route. A tie goes to the answer of the heaviest expert.

    Cost: one reply per expert of the route, and one embedding. Source: weighted votes by profile, as in Symbolic-MoE's
    local scores (https://arxiv.org/abs/2503.05641).
    """

    Options: ClassVar[type[Config]] = WeightedOptions
    several: ClassVar[bool] = True
    cost: ClassVar[str] = "one reply per expert of the route, one embedding of the question"
    source: ClassVar[str] = "skill profiles as weights, https://arxiv.org/abs/2503.05641"

    def __init__(self, options: WeightedOptions, *, seed: int = 0, device: str = "auto") -> None:
        from xpert.embedding import open_embedder

        self.options = options
        self._scores: dict[str, Mapping[str, float]] = {}
        self._embedder: Embedder = open_embedder(options.embedder, device=device, seed=seed)
        self._labels: list[str] = []
        self._exemplars: Floats | None = None

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Embeds the exemplars of skills that somebody is profiled on; experts without a profile are taken too."""
        ordered = sorted(experts, key=lambda expert: expert.key)
        self._scores = {expert.key: expert.skill_scores for expert in ordered}
        profiled = {skill for expert in ordered for skill in expert.skill_scores}
        found = [
            (label, text)
            for expert in ordered
            for text, label in zip(expert.exemplars, expert.exemplar_skills or _sole_skill(expert), strict=True)
            if label in profiled and text.strip()
        ]
        self._labels = [label for label, _ in found]
        self._exemplars = None
        if found and self.options.weight == "nearest":
            texts = [text for _, text in found]
            self._embedder.fit(texts)
            self._exemplars = self._embedder.embed(texts)

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        keys, asks = asks_of(question)
        replies = [reply for reply in (yield asks) if isinstance(reply, Answer)]
        weights, why = self.weights(question)
        ballots = [Ballot(alone(key), reply, weights.get(key, 1.0)) for key, reply in zip(keys, replies, strict=True)]
        verdict = vote(ballots, question, self.options.by)
        log = {**verdict.log, "weights": {key: rounded(weight) for key, weight in weights.items()}, "weighed_by": why}
        return Verdict(verdict.text, verdict.experts, f"{verdict.reason}, weighed by {why}", verdict.finished, log)

    def weights(self, question: Question) -> tuple[dict[str, float], str]:
        """Expert -> what its vote counts, and what that is. Where all count nothing, they count alike."""
        route = dict(members_of(question))
        raw, why = self._raw(question, list(route))
        if raw is None:
            raw = route
        weights = {key: score**self.options.power for key, score in raw.items()}
        if route and not any(weights.values()):
            return dict.fromkeys(route, 1.0), f"nothing, since all have 0 by {why}"
        return weights, why

    def _raw(self, question: Question, keys: Sequence[str]) -> tuple[dict[str, float] | None, str]:
        if self.options.weight == "route" or not keys:
            return None, "the route"
        without = [key for key in keys if not self._scores.get(key)]
        if without:
            return None, f"the route, since {without[0]} has no profile"
        skill = self._skill(question) if self.options.weight == "nearest" else None
        if skill is not None and all(skill in self._scores[key] for key in keys):
            return {key: self._scores[key][skill] for key in keys}, f"their scores on {skill}"
        means = {key: float(np.mean(list(self._scores[key].values()))) for key in keys}
        return means, "their mean scores"

    def _skill(self, question: Question) -> str | None:
        """The skill whose three nearest exemplars are nearest; None where none is like the question at all."""
        if self._exemplars is None:
            return None
        prompt = RouteRequest(question.id, question.messages).prompt
        cosines = np.round(self._exemplars @ self._embedder.embed([prompt])[0], 5)
        best: tuple[float, str] | None = None
        for label in sorted(set(self._labels)):
            own = np.sort(cosines[[index for index, one in enumerate(self._labels) if one == label]])
            score = float(own[-_NEIGHBOURS:].mean())
            if best is None or score > best[0]:
                best = (score, label)
        return best[1] if best is not None and best[0] > 0 else None


def _sole_skill(expert: RoutableExpert) -> tuple[str, ...]:
    """The labels of exemplars that have none: the expert's only skill, if it has one."""
    label = expert.skills[0] if len(expert.skills) == 1 else ""
    return (label,) * len(expert.exemplars)


PLUGIN = WeightedAggregator
