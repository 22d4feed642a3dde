"""How near a prompt must lie to a skill before its expert answers: found from exemplars that were left out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xpert.experts.routers._skill_space import PromptSpace, SkillGroup, SkillSpace
from xpert.protocols import Floats

__all__ = ["ENOUGH", "FOLDS", "calibrated"]

FOLDS = 2
ENOUGH = 8
"""Left-out exemplars from which a skill gets a threshold of its own."""

STRANGERS = 4096
"""Left-out exemplars of each fold that all skills are held against, evenly spread where there are more."""
_BLOCK = 256
_ANY = 1e-5
"""Exemplars that stand alone leave nothing to compare with: then any likeness is enough."""


def calibrated(
    groups: Sequence[SkillGroup],
    vectors: Floats,
    mode: str,
    refit: Callable[[], PromptSpace] | None,
    *,
    reject: float,
    strictness: float,
) -> NDArray[np.float64]:
    """Thresholds [groups], each between the weakest of its own exemplars and the strongest of others', by `strictness`.

    Weakest and strongest are the `reject` quantile and its counterpart from above, of the scores of exemplars left
    out of the space that scores them (every FOLDS-th of each group in turn). Own exemplars alone would set the
    threshold too high: they share their wordings, so left-out ones fit better than a user's own words do. Where others
    reach as high as its own, a skill keeps to its own; without other experts the strongest counts as 0. A skill with
    fewer than ENOUGH left-out exemplars takes the quantile of all skills together, and so does one known by prototypes
    alone, whose centroids count among others' exemplars; where no expert has exemplars, such a skill's threshold is the
    strongest of other experts' centroids. Pilots are left out of all this: they were picked for lying far from the
    others, and would set the threshold too low.

    vectors [exemplars, d] follow the groups' texts; `refit` makes an embedder that is to be fitted anew in each fold.
    Time O(exemplars d) for the own and O(STRANGERS rows d) for the others, beside the fits; memory O(groups STRANGERS
    reject).
    """
    groups, vectors = _without_pilots(groups, vectors)
    own: list[list[float]] = [[] for _ in groups]
    experts = np.unique([group.expert for group in groups], return_inverse=True)[1]
    most = min(FOLDS * STRANGERS, len(vectors) + sum(len(g.prototypes) for g in groups if g.prototypes is not None))
    others = _Strongest(experts, reject, most)
    for fold in _folds(groups, vectors, refit):
        space = SkillSpace(fold.kept, fold.vectors, mode)
        for place, part in fold.own_rows():
            own[fold.present[place]] += space.own(fold.prompts[part], place).tolist()
        some = np.unique(np.linspace(0, len(fold.prompts) - 1, min(len(fold.prompts), STRANGERS)).round().astype(int))
        for start in range(0, len(some), _BLOCK):
            rows = some[start : start + _BLOCK]
            others.add(space.scores(fold.prompts[rows]), fold.present, fold.of_group[rows])
    everyone = [score for scores in own for score in scores]
    together = _low(everyone, reject) if everyone else None
    found = np.empty(len(groups))
    for index, (group, mine, theirs) in enumerate(zip(groups, own, others.found(), strict=True)):
        if len(mine) >= ENOUGH:
            weakest = _low(mine, reject)
        elif together is None and group.prototypes is not None:
            weakest = max(theirs, _ANY)
        else:
            weakest = _ANY if together is None else together
        found[index] = theirs + strictness * (weakest - theirs) if theirs < weakest else weakest
    return found


def _without_pilots(groups: Sequence[SkillGroup], vectors: Floats) -> tuple[list[SkillGroup], Floats]:
    kept: list[SkillGroup] = []
    rows: list[int] = []
    start = 0
    for group in groups:
        trained = len(group.texts) - group.pilots
        rows += range(start, start + trained)
        start += len(group.texts)
        kept.append(dataclasses.replace(group, texts=group.texts[:trained], pilots=0))
    return kept, vectors[rows]


class _Fold:
    """Groups without every FOLDS-th of their exemplars, and those as prompts.

    kept: the groups of which something is left, `present` their numbers; prompts [n, d], each of group `of_group`.
    """

    def __init__(
        self,
        groups: Sequence[SkillGroup],
        vectors: Floats,
        fold: int,
        refit: Callable[[], PromptSpace] | None,
    ) -> None:
        self.kept: list[SkillGroup] = []
        self.present: NDArray[np.int64]
        present: list[int] = []
        stay: list[int] = []
        leave: list[int] = []
        of_group: list[int] = []
        start = 0
        for index, group in enumerate(groups):
            rows = range(start, start + len(group.texts))
            start = rows.stop
            held = [row for row in rows if (row - rows.start) % FOLDS != fold]
            if not held and group.prototypes is None:
                continue
            present.append(index)
            self.kept.append(
                SkillGroup(
                    group.expert, group.label, tuple(group.texts[row - rows.start] for row in held), group.prototypes
                )
            )
            stay += held
            left = rows[fold::FOLDS]
            leave += left
            of_group += [index] * len(left)
        self.present = np.array(present, np.int64)
        texts = [text for group in groups for text in group.texts]
        self.vectors, self.prompts = vectors[stay], vectors[leave]
        if refit is not None and stay and leave:
            space = refit()
            self.vectors = space.learn([texts[row] for row in stay])
            self.prompts = space.prompts([texts[row] for row in leave])
        self.left = len(leave)
        if fold == 0:
            centroids = [(i, group.prototypes) for i, group in enumerate(groups) if group.prototypes is not None]
            if centroids:
                left_out = [self.prompts] if leave else []
                self.prompts = np.concatenate([*left_out, *(rows for _, rows in centroids)]).astype(np.float32)
                of_group += [index for index, rows in centroids for _ in rows]
        self.of_group = np.array(of_group, np.int64)

    def own_rows(self) -> Iterator[tuple[int, slice]]:
        """(place of a group among those present, the prompts that are its left-out exemplars)."""
        numbers = self.of_group[: self.left]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for start, end in itertools.pairwise([*starts, self.left]):
            yield int(np.searchsorted(self.present, numbers[start])), slice(start, end)


def _folds(groups: Sequence[SkillGroup], vectors: Floats, refit: Callable[[], PromptSpace] | None) -> Iterator[_Fold]:
    for number in range(FOLDS):
        fold = _Fold(groups, vectors, number, refit)
        if len(fold.prompts) and fold.kept:
            yield fold


class _Strongest:
    """Per group the `reject` quantile from above of the scores of other experts' prompts, block by block.

    Of n scores it is the (1 + floor(reject (n - 1)))-th largest: only as many are kept as that is for `most` scores,
    which no group gets more of. experts [groups]: numbers.
    """

    def __init__(self, experts: NDArray[np.int64], reject: float, most: int) -> None:
        self._experts, self._reject = experts, reject
        self._kept = math.floor(reject * max(most - 1, 0)) + 1
        self._counts = np.zeros(len(experts), np.int64)
        self._best = np.zeros((len(experts), 0), np.float32)

    def add(self, scores: Floats, present: NDArray[np.int64], of_group: NDArray[np.int64]) -> None:
        """scores [n, present groups] of prompts that belong to the groups `of_group` [n]."""
        foreign = self._experts[present][:, None] != self._experts[of_group][None, :]
        block = np.full((len(self._experts), len(of_group)), -np.inf, np.float32)
        block[present] = np.where(foreign, scores.T, -np.inf)
        self._counts[present] += foreign.sum(axis=1)
        together = np.concatenate([self._best, block], axis=1)
        surplus = together.shape[1] - self._kept
        self._best = np.partition(together, surplus, axis=1)[:, surplus:] if surplus > 0 else together

    def found(self) -> list[float]:
        """0 for a group that met no one."""
        ordered = -np.sort(-self._best, axis=1)
        places = np.floor(self._reject * np.maximum(self._counts - 1, 0)).astype(np.int64)
        return [
            float(row[place]) if count else 0.0 for row, place, count in zip(ordered, places, self._counts, strict=True)
        ]


def _low(scores: Sequence[float], share: float) -> float:
    """The quantile, of the two scores around it the lower."""
    return sorted(scores)[math.floor(share * (len(scores) - 1))]
