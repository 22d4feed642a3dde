"""Nearest skill over embedded exemplars: adding or removing an expert trains nothing.

First form of RouterRetriever (https://arxiv.org/abs/2409.02685): an expert's pilots are the centroids of its
exemplar prompts, one per skill. Exemplars of one skill often lie in several places, where their mean describes none
of them, so by default a skill is as near as its three nearest exemplars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.routers._choice import ranked, softmax_weights
from xpert.experts.routers._familiarity import Familiarity
from xpert.protocols import Candidate, EmbedderContext, Floats, RoutableExpert, Route, RouteRequest

if TYPE_CHECKING:
    from xpert.protocols import Embedder

__all__ = ["PLUGIN", "CentroidOptions", "CentroidRouter"]

NEIGHBOURS = 3
"""Exemplars of a skill whose mean cosine is the skill's score in mode `nearest`."""

FOLDS = 2
ENOUGH = 8
"""Left-out exemplars from which a skill gets a threshold of its own."""


@dataclass(frozen=True)
class CentroidOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on the exemplars), minilm, st:NAME or lm")
    mode: str = option(
        "nearest", "similarity to a skill's nearest exemplars, or to its centroid", choices=("nearest", "centroid")
    )
    top: int = option(1, "how many experts answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over cosines that weights them, if top > 1", minimum=1e-6)
    threshold: float | None = option(
        None,
        "cosine under which the base answers; by default from the exemplars, see strictness",
        minimum=-1,
        maximum=1,
    )
    reject: float = option(
        0.02,
        "share of a skill's exemplars, and of the others', that may lie beyond the bounds its threshold is set between",
        minimum=0,
        maximum=1,
    )
    strictness: float = option(
        0.5,
        "where between others (0) and its own (1) the threshold lies: more leaves more to the base",
        minimum=0,
        maximum=1,
    )
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


@dataclass(frozen=True)
class _Group:
    """The exemplars of one skill of one expert, its pilots apart from those of its training."""

    expert: str
    label: str
    texts: tuple[str, ...]
    pilots: tuple[str, ...] = ()


class CentroidRouter:
    """cosine(prompt, skill) -> the experts of the nearest skills, or the base model below the threshold.

    A skill's score is the cosine to the mean of its exemplars (mode centroid) or the mean cosine to its three nearest
    exemplars (mode nearest, for experts whose exemplars lie in several places); an expert's score is its best
    skill's. With lsa, which is fitted on the exemplars, the cosine counts the prompt's unknown words too (see
    `Familiarity`). Preparing embeds all exemplars, and with lsa fits it 1 + FOLDS times; a prompt costs one embedding
    and one product with [groups, d] or [exemplars, d].
    """

    Options = CentroidOptions
    needs_exemplars = True

    def __init__(self, options: CentroidOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        name, _, argument = options.embedder.partition(":")
        kind = plugins.load("embedder", name)
        context = EmbedderContext(argument=argument or None, base=options.base, device=device, seed=seed)
        self._new_embedder: Callable[[], Embedder] = lambda: kind(context)
        self._fitted = name == "lsa"
        self.space: _Space | None = None
        self.groups: list[_Group] = []
        self.thresholds: list[float] = []

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert without exemplars: it could never be reached."""
        self.groups = []
        # In an order of their own: the axes of a fitted space depend on the order of its texts, and routes must not.
        for expert in sorted(experts, key=lambda expert: expert.key):
            if not any(text.strip() for text in expert.exemplars):
                raise BadInput(
                    f"expert {expert.key!r} has no exemplars, which router centroid needs",
                    hint="train it with shots, or mix with --router fixed",
                )
            self.groups += _groups_of(expert)
        if not self.groups:
            return
        embedder = self._new_embedder()
        self.space = _Space(self.groups, embedder, self.options.mode, fit=self._fitted)
        given = self.options.threshold
        self.thresholds = self._calibrated(embedder) if given is None else [given] * len(self.groups)

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self.space is None:
            return [Route((), (), "centroid: the mixture has no experts; the base answers")] * len(requests)
        if not requests:
            return []
        # Rounded, since a product's last bits depend on the size of the batch and routes must not.
        return [self._route(row) for row in np.round(self.space.scores([r.prompt for r in requests]), 5)]

    def _route(self, scores: Floats) -> Route:
        best: dict[str, float] = {}
        nearest: dict[str, int] = {}
        for index, score in enumerate(scores.tolist()):
            key = self.groups[index].expert
            if score > best.get(key, -2.0):
                best[key], nearest[key] = score, index
        candidates = ranked(best)
        first = candidates[0]
        reason = f"nearest skill {self._label(nearest, first)!r} of {first.expert}, cosine {first.score:.2f}"
        threshold = self.thresholds[nearest[first.expert]]
        if first.score < threshold:
            return Route((), candidates, f"{reason}, is under its threshold {threshold:.2f}; the base answers")
        if len(candidates) > 1:
            second = candidates[1]
            reason += f"; next {self._label(nearest, second)!r} of {second.expert}, {second.score:.2f}"
        chosen = [
            candidate
            for candidate in candidates[: self.options.top]
            if candidate.score >= self.thresholds[nearest[candidate.expert]]
        ]
        return Route(softmax_weights(chosen, temperature=self.options.temperature), candidates, reason)

    def _label(self, nearest: Mapping[str, int], candidate: Candidate) -> str:
        return self.groups[nearest[candidate.expert]].label

    def _calibrated(self, embedder: Embedder) -> list[float]:
        """Per skill, between the weakest of its own exemplars and the strongest of other experts', by `strictness`.

        Weakest and strongest are the `reject` quantile and its counterpart from above, of the scores of exemplars left
        out of the space that scores them (every FOLDS-th of each group in turn). Own exemplars alone would set the
        threshold too high: they share their wordings, so left-out ones fit better than a user's own words do. Where
        others reach as high as its own, a skill keeps to its own; without other experts the strongest counts as 0. A
        skill with fewer than ENOUGH left-out exemplars takes the quantile of all skills together. Pilots are left out
        of all this: they were picked for lying far from the others, and would set the threshold too low.
        """
        own: list[list[float]] = [[] for _ in self.groups]
        others: list[list[float]] = [[] for _ in self.groups]
        for fold in range(FOLDS):
            kept = [_Group(g.expert, g.label, _without(g.texts, fold)) for g in self.groups]
            present = [index for index, group in enumerate(kept) if group.texts]
            left_out = [(place, text) for place, i in enumerate(present) for text in self.groups[i].texts[fold::FOLDS]]
            if not left_out:
                continue
            maker = self._new_embedder() if self._fitted else embedder
            space = _Space([kept[index] for index in present], maker, self.options.mode, fit=self._fitted)
            scores = space.scores([text for _, text in left_out])
            experts = np.array([self.groups[index].expert for index in present])
            for row, (place, _) in zip(scores, left_out, strict=True):
                own[present[place]].append(float(row[place]))
                for other in np.flatnonzero(experts != experts[place]):
                    others[present[other]].append(float(row[other]))
        together = _low([score for scores in own for score in scores], self.options.reject)
        return [
            _between(
                _low(mine, self.options.reject) if len(mine) >= ENOUGH else together,
                -_low([-score for score in theirs], self.options.reject) if theirs else 0.0,
                self.options.strictness,
            )
            for mine, theirs in zip(own, others, strict=True)
        ]


def _between(own: float, others: float, strictness: float) -> float:
    return others + strictness * (own - others) if others < own else own


class _Space:
    """Groups in an embedding space: texts -> the score of each group."""

    def __init__(self, groups: Sequence[_Group], embedder: Embedder, mode: str, *, fit: bool) -> None:
        each = [(*group.texts, *group.pilots) for group in groups]
        texts = [text for own in each for text in own]
        ends = np.cumsum([len(own) for own in each]).tolist()
        self.parts = [slice(end - len(own), end) for own, end in zip(each, ends, strict=True)]
        embedder.fit(texts)
        self.embedder, self.mode = embedder, mode
        self.exemplars = embedder.embed(texts)
        self.centroids = _unit(np.stack([self.exemplars[part].mean(axis=0) for part in self.parts]))
        self.familiarity = Familiarity(texts) if fit else None

    def scores(self, texts: Sequence[str]) -> Floats:
        """[n] texts -> [n, groups]."""
        embeddings = self.embedder.embed(texts)
        if self.mode == "centroid":
            scores = embeddings @ self.centroids.T
        else:
            similar = embeddings @ self.exemplars.T
            scores = np.stack([_nearest_mean(similar[:, part]) for part in self.parts], axis=1)
        if self.familiarity is not None:
            scores = scores * self.familiarity.of(texts)[:, None]
        return scores


def _groups_of(expert: RoutableExpert) -> list[_Group]:
    """By label. Without labels, all exemplars of an expert are one group that bears its key."""
    labels = expert.exemplar_skills or ("",) * len(expert.exemplars)
    trained = len(expert.exemplars) - expert.pilots
    texts: dict[str, list[str]] = {}
    pilots: dict[str, list[str]] = {}
    for place, (text, skill) in enumerate(zip(expert.exemplars, labels, strict=True)):
        if text.strip():
            (texts if place < trained else pilots).setdefault(skill or expert.key, []).append(text)
    return [
        _Group(expert.key, label, tuple(texts.get(label, ())), tuple(pilots.get(label, ())))
        for label in sorted({**texts, **pilots})
    ]


def _without(texts: Sequence[str], fold: int) -> tuple[str, ...]:
    return tuple(text for index, text in enumerate(texts) if index % FOLDS != fold)


def _nearest_mean(similar: Floats) -> Floats:
    """[n, m] -> the mean of each row's largest cosines [n]."""
    count = min(NEIGHBOURS, similar.shape[1])
    nearest: Floats = np.sort(similar, axis=1)[:, -count:].mean(axis=1)
    return nearest


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = (vectors / np.maximum(length, 1e-12)).astype(np.float32)
    return unit


def _low(scores: Sequence[float], share: float) -> float:
    # Exemplars that stand alone leave nothing to compare with: then any likeness is enough.
    return float(np.quantile(scores, share, method="lower")) if scores else 1e-5


PLUGIN = CentroidRouter
