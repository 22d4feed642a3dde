"""Nearest skill centroid over embedded exemplars: adding or removing an expert trains nothing.

First form of RouterRetriever (https://arxiv.org/abs/2409.02685): an expert's pilots are the centroids of its
exemplar prompts, one per skill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.routers._choice import ranked, softmax_weights
from xpert.protocols import Candidate, EmbedderContext, Floats, RoutableExpert, Route, RouteRequest

if TYPE_CHECKING:
    from xpert.protocols import Embedder

__all__ = ["PLUGIN", "CentroidOptions", "CentroidRouter"]

NEIGHBOURS = 3
"""Exemplars of a skill whose mean cosine is the skill's score in mode `nearest`."""


@dataclass(frozen=True)
class CentroidOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on the exemplars), minilm, st:NAME or lm")
    mode: str = option(
        "centroid", "similarity to a skill's centroid, or to its nearest exemplars", choices=("centroid", "nearest")
    )
    top: int = option(1, "how many experts answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over cosines that weights them, if top > 1", minimum=1e-6)
    threshold: float | None = option(
        None, "cosine under which the base answers; by default from the exemplars, see reject", minimum=-1, maximum=1
    )
    reject: float = option(
        0.02, "sets the threshold: this share of the exemplars, each left out in turn, lies under it", minimum=0, maximum=1
    )
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


@dataclass(frozen=True)
class _Group:
    """The exemplars of one skill of one expert: rows `first:last` of the exemplar matrix."""

    expert: str
    label: str
    first: int
    last: int


class CentroidRouter:
    """cosine(prompt, skill) -> the experts of the nearest skills, or the base model below the threshold.

    A skill's score is the cosine to the mean of its exemplars (mode centroid) or the mean cosine to its three nearest
    exemplars (mode nearest, for experts whose exemplars lie in several places); an expert's score is its best
    skill's. Preparing embeds all exemplars once; a prompt costs one embedding and one product with [groups, d] or
    [exemplars, d].
    """

    Options = CentroidOptions

    def __init__(self, options: CentroidOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options
        name, _, argument = options.embedder.partition(":")
        context = EmbedderContext(argument=argument or None, base=options.base, device=device, seed=seed)
        self.embedder: Embedder = plugins.load("embedder", name)(context)
        self.groups: list[_Group] = []
        self.threshold = -1.0

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert without exemplars: it could never be reached."""
        texts: list[str] = []
        self.groups = []
        for expert in experts:
            if not any(text.strip() for text in expert.exemplars):
                raise BadInput(
                    f"expert {expert.key!r} has no exemplars, which router centroid needs",
                    hint="train it with shots, or mix with --router fixed",
                )
            for label, members in _by_skill(expert).items():
                self.groups.append(_Group(expert.key, label, len(texts), len(texts) + len(members)))
                texts.extend(members)
        self.keys = [expert.key for expert in experts]
        if not texts:
            return
        self.embedder.fit(texts)
        self.exemplars = self.embedder.embed(texts)
        self.centroids = np.stack([_unit(self.exemplars[g.first : g.last].mean(axis=0)) for g in self.groups])
        given = self.options.threshold
        self.threshold = self._calibrated() if given is None else given

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if not requests:
            return []
        if not self.groups:
            return [Route((), (), "centroid: the mixture has no experts; the base answers")] * len(requests)
        # Rounded, since a product's last bits depend on the size of the batch and routes must not.
        scores = np.round(self._scores(self.embedder.embed([request.prompt for request in requests])), 5)
        return [self._route(row) for row in scores]

    def _scores(self, embeddings: Floats) -> Floats:
        """[n, d] -> cosine of each prompt to each group [n, groups]."""
        if self.options.mode == "centroid":
            return embeddings @ self.centroids.T
        similar = embeddings @ self.exemplars.T
        return np.stack([_nearest_mean(similar[:, g.first : g.last]) for g in self.groups], axis=1)

    def _route(self, scores: Floats) -> Route:
        best: dict[str, float] = {}
        label: dict[str, str] = {}
        for group, score in zip(self.groups, scores.tolist(), strict=True):
            if score > best.get(group.expert, -2.0):
                best[group.expert], label[group.expert] = score, group.label
        candidates = ranked(best)
        first = candidates[0]
        nearest = f"nearest skill {label[first.expert]!r} of {first.expert}, cosine {first.score:.2f}"
        if first.score < self.threshold:
            return Route((), candidates, f"{nearest}, is under the threshold {self.threshold:.2f}; the base answers")
        chosen = [c for c in candidates[: self.options.top] if c.score >= self.threshold]
        weights = softmax_weights(chosen, temperature=self.options.temperature)
        return Route(weights, candidates, nearest + _rest(candidates, label))

    def _calibrated(self) -> float:
        """The `reject` quantile of the exemplars' scores for their own skill, each scored as if it were not in it."""
        own = [_left_out(self.exemplars[g.first : g.last], self.options.mode) for g in self.groups]
        scores = np.concatenate(own)
        # An expert known by a single exemplar leaves nothing to compare with: then any likeness is enough.
        return float(np.quantile(scores, self.options.reject, method="lower")) if len(scores) else 0.0


def _by_skill(expert: RoutableExpert) -> dict[str, list[str]]:
    """label -> exemplars. Without labels, all exemplars of an expert are one group that bears its key."""
    labels = expert.exemplar_skills or ("",) * len(expert.exemplars)
    groups: dict[str, list[str]] = {}
    for text, skill in zip(expert.exemplars, labels, strict=True):
        if text.strip():
            groups.setdefault(skill or expert.key, []).append(text)
    return groups


def _left_out(members: Floats, mode: str) -> NDArray[np.float32]:
    """The score of each exemplar [m, d] for its group without it [m]; none where the group has one member."""
    if len(members) < 2:
        return np.zeros(0, dtype=np.float32)
    if mode == "nearest":
        similar = members @ members.T
        np.fill_diagonal(similar, -np.inf)
        return _nearest_mean(similar, among=len(members) - 1)
    others = members.sum(axis=0)[None, :] - members
    return np.einsum("md,md->m", members, _unit(others))


def _nearest_mean(similar: Floats, *, among: int | None = None) -> Floats:
    """[n, m] -> the mean of each row's largest cosines."""
    count = min(NEIGHBOURS, among if among is not None else similar.shape[1])
    return np.sort(similar, axis=1)[:, -count:].mean(axis=1)


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)


def _rest(candidates: tuple[Candidate, ...], label: dict[str, str]) -> str:
    if len(candidates) < 2:
        return ""
    second = candidates[1]
    return f"; next {label[second.expert]!r} of {second.expert}, {second.score:.2f}"


PLUGIN = CentroidRouter
