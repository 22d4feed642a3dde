"""Skills as groups of vectors: how near a prompt lies to each of them, for any number of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xpert.embedding import FittedEmbedder
from xpert.experts.routers._familiarity import Familiarity
from xpert.protocols import Embedder, Floats, RoutableExpert

__all__ = ["NEIGHBOURS", "PromptSpace", "SkillGroup", "SkillSpace", "groups_of"]

NEIGHBOURS = 3
"""Exemplars of a skill whose mean cosine is the skill's score in mode `nearest`."""

_CELLS = 4_000_000
"""Cosines held at once: 16 MB."""


@dataclass(frozen=True)
class SkillGroup:
    """What stands for one skill of one expert: its exemplars, or where it has none, unit centroids [c, d] of them.

    pilots: how many of the texts, the last ones, are pilots and not exemplars of its training.
    """

    expert: str
    label: str
    texts: tuple[str, ...]
    prototypes: Floats | None = field(default=None, compare=False)
    pilots: int = 0


def groups_of(expert: RoutableExpert, identity: str | None) -> list[SkillGroup]:
    """By label, sorted. Without labels, all of an expert's exemplars are one group that bears its key.

    Prototypes are read for an expert without exemplars alone, those of the embedder `identity`. Empty for an expert
    that has neither.
    """
    labels = expert.exemplar_skills or ("",) * len(expert.exemplars)
    trained = len(expert.exemplars) - expert.pilots
    texts: dict[str, list[str]] = {}
    pilots: dict[str, int] = {}
    for place, (text, skill) in enumerate(zip(expert.exemplars, labels, strict=True)):
        if text.strip():
            texts.setdefault(skill or expert.key, []).append(text)
            pilots[skill or expert.key] = pilots.get(skill or expert.key, 0) + (place >= trained)
    if texts:
        return [SkillGroup(expert.key, label, tuple(own), None, pilots[label]) for label, own in sorted(texts.items())]
    names, centroids = expert.prototypes.get(identity or "", ((), np.zeros((0, 0), np.float32)))
    rows: dict[str, list[int]] = {}
    for row, skill in enumerate(names):
        rows.setdefault(skill or expert.key, []).append(row)
    return [SkillGroup(expert.key, label, (), centroids[own]) for label, own in sorted(rows.items())]


class PromptSpace:
    """An embedder that has learned the exemplars: texts -> vectors, and prompts -> vectors to compare with those.

    fitted: the embedder knows the exemplars' words alone. A prompt's vector is then shortened by its unknown words
    (see `Familiarity`), so that products with it count them too.
    """

    def __init__(self, embedder: Embedder, *, fitted: bool) -> None:
        self.embedder, self._fitted = embedder, fitted
        self._familiarity: Familiarity | None = None

    def learn(self, texts: Sequence[str]) -> Floats:
        """[n] texts -> [n, d], rows of length 1."""
        self._familiarity = Familiarity(texts) if self._fitted else None
        if isinstance(self.embedder, FittedEmbedder):
            return self.embedder.fit_embed(texts)
        self.embedder.fit(texts)
        return self.embedder.embed(texts)

    def prompts(self, texts: Sequence[str]) -> Floats:
        """[n] texts -> [n, d], rows of length at most 1."""
        vectors = self.embedder.embed(texts)
        if self._familiarity is None:
            return vectors
        scaled: Floats = vectors * self._familiarity.of(texts)[:, None]
        return scaled


class SkillSpace:
    """Groups as rows of one matrix: prompts' vectors -> the score of each group.

    A group scores the mean of its `NEIGHBOURS` largest cosines (mode nearest), the cosine to the mean of its exemplars
    (mode centroid), or, by prototypes, that to the nearest of them. `vectors` [exemplars, d] follow the groups' texts.

    Rows lie by level: of all groups the first row, largest group first, then of all that have one the second, and so
    on. A level is compared with the first groups of the level before in one step, whatever the groups' sizes: a
    prompt costs O(rows d), and a few operations a row in slices.
    """

    def __init__(self, groups: Sequence[SkillGroup], vectors: Floats, mode: str) -> None:
        rows, counts, start = [], [], 0
        for group in groups:
            own = vectors[start : start + len(group.texts)]
            start += len(group.texts)
            if group.prototypes is not None:
                own, count = group.prototypes, 1
            elif mode == "centroid":
                own, count = _unit(own.mean(axis=0, keepdims=True)), 1
            else:
                count = min(NEIGHBOURS, len(own))
            rows.append(own)
            counts.append(count)
        sizes = np.array([len(own) for own in rows])
        order = np.argsort(-sizes, kind="stable")
        self.place: NDArray[np.int64] = np.empty(len(order), np.int64)
        """Group -> its place among the groups by size."""
        self.place[order] = np.arange(len(order))
        self._counts = np.array(counts)[order]
        self._divide = np.maximum(self._counts, 1).astype(np.float32)
        levels = [int((sizes > level).sum()) for level in range(int(sizes.max()))]
        self._starts = np.concatenate([[0], np.cumsum(levels)])
        self._sizes = sizes
        self._matrix = np.empty((int(self._starts[-1]), rows[0].shape[1]), np.float32)
        for own, place in zip(rows, self.place, strict=True):
            self._matrix[self._starts[: len(own)] + place] = own

    def scores(self, prompts: Floats) -> Floats:
        """[n, d] -> [n, groups] float32. The last bits depend on how many prompts there are."""
        found = np.empty((len(prompts), len(self._counts)), np.float32)
        for start, similar in self._blocks(prompts):
            found[start : start + len(similar)] = self._means(similar)[:, self.place]
        return found

    def exact(self, prompt: Floats, groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """[d] -> [len(groups)] in float64: the same, but for the last of 16 digits, whatever else is scored."""
        sizes = self._sizes[groups]
        width = int(sizes.max())
        levels = np.arange(width)
        there = levels < sizes[:, None]
        rows = np.where(there, self._starts[:width] + self.place[groups][:, None], 0)
        similar = np.einsum("gld,d->gl", self._matrix[rows].astype(np.float64), prompt.astype(np.float64))
        similar[~there] = -np.inf
        ordered = -np.sort(-similar, axis=1)[:, :NEIGHBOURS]
        counts = self._counts[self.place[groups]]
        kept = np.arange(ordered.shape[1]) < counts[:, None]
        found: NDArray[np.float64] = np.where(kept, ordered, 0).sum(axis=1) / counts
        return found

    def own(self, prompts: Floats, group: int) -> Floats:
        """[n, d] -> the scores of one group [n]."""
        rows = self._matrix[self._starts[: self._sizes[group]] + self.place[group]]
        count = int(self._counts[self.place[group]])
        nearest: Floats = np.sort(prompts @ rows.T, axis=1)[:, -count:].mean(axis=1)
        return nearest

    def _blocks(self, prompts: Floats) -> Iterator[tuple[int, Floats]]:
        step = max(1, _CELLS // len(self._matrix))
        for start in range(0, len(prompts), step):
            yield start, prompts[start : start + step] @ self._matrix.T

    def _means(self, similar: Floats) -> Floats:
        """Cosines [n, rows] -> the mean of each group's largest [n, groups by size]."""
        width = int(self._starts[1])
        most = similar[:, :width].copy()
        if self._counts.max() == 1:
            for level in range(1, len(self._starts) - 1):
                row = similar[:, self._starts[level] : self._starts[level + 1]]
                np.maximum(most[:, : row.shape[1]], row, out=most[:, : row.shape[1]])
            return most
        second, third = (np.full_like(most, -np.inf) for _ in range(2))
        for level in range(1, len(self._starts) - 1):
            row = similar[:, self._starts[level] : self._starts[level + 1]]
            part = slice(0, row.shape[1])
            # What loses against a place is handed on to the next one.
            lost = np.minimum(most[:, part], row)
            np.maximum(most[:, part], row, out=most[:, part])
            kept = second[:, part]
            np.maximum(third[:, part], np.minimum(kept, lost), out=third[:, part])
            np.maximum(kept, lost, out=kept)
        total = most
        for count, extra in ((2, second), (3, third)):
            total = np.where(self._counts >= count, total + extra, total)
        found: Floats = total / self._divide
        return found


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = (vectors / np.maximum(length, 1e-12)).astype(np.float32)
    return unit
