"""Skills x experts: the table that the heat map and the comparison draw, as plain lists for the pages' script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.registry.card import Interval, SkillScore
from xpert.registry.site.data import Catalogue, ShownVersion
from xpert.registry.site.wording import place, shown

__all__ = ["GROUPS", "MOST_LIKENED", "Matrix", "likeness_order", "skill_matrix"]

GROUPS = ("skills", "clusters", "keywords")
MOST_LIKENED = 1_000
"""Experts up to which they are ordered by likeness, which takes time and memory by their square."""

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Matrix:
    """Cells of scores: `columns` are (skill, metric, suite), `cells[i]` those of `versions[i]` as column -> score.

    A skill that was scored by two suites, or by two metrics, has two columns: their scores do not compare.
    """

    columns: tuple[_Key, ...]
    versions: tuple[ShownVersion, ...]
    cells: tuple[Mapping[int, SkillScore], ...]

    def to_plain(self) -> dict[str, Any]:
        """`columns` [[skill, metric, suite]], `cells` per version [[column, expert, base]] with [score, low, high, n]."""
        return {
            "columns": [
                [shown(skill, 80), shown(metric, 40), place(suite, 80)] for skill, metric, suite in self.columns
            ],
            "cells": [
                [[column, _plain(score.expert), _plain(score.base)] for column, score in sorted(cells.items())]
                for cells in self.cells
            ],
        }

    def scores(self) -> NDArray[np.float64]:
        """[versions, columns], NaN where there is no score."""
        found = np.full((len(self.versions), len(self.columns)), np.nan)
        for row, cells in enumerate(self.cells):
            for column, score in cells.items():
                found[row, column] = score.expert.score
        return found


def skill_matrix(found: Catalogue, *, group: str = "skills", every: bool = False) -> Matrix:
    """The scores of the latest version of every name, or of every version; those without any are left out."""
    versions = [v for name in found.names for v in (name.versions if every else (name.latest,))]
    held = [(version, _scores_of(version, group)) for version in versions]
    held = [(version, scores) for version, scores in held if scores]
    # Suites of one name but other items are told apart by the beginning of their fingerprints.
    suites: dict[str, set[str]] = {}
    for version, _ in held:
        profile = version.profile
        assert profile is not None
        suites.setdefault(place(profile.suite, 60), set()).add(profile.suite_fingerprint)

    def key(version: ShownVersion, skill: str, metric: str) -> _Key:
        profile = version.profile
        assert profile is not None
        suite = place(profile.suite, 60)
        return skill, metric, suite if len(suites[suite]) == 1 else f"{suite} {profile.suite_fingerprint[:8]}"

    columns = sorted({key(version, skill, score.metric) for version, scores in held for skill, score in scores.items()})
    at = {column: index for index, column in enumerate(columns)}
    cells = tuple({at[key(v, skill, score.metric)]: score for skill, score in scores.items()} for v, scores in held)
    return Matrix(tuple(columns), tuple(version for version, _ in held), cells)


def likeness_order(values: NDArray[np.float64]) -> list[int]:
    """The rows of [n, d] so ordered that like ones are neighbours: the leaves of an average-linkage tree.

    Missing values (NaN) count as the mean of their column. Time and memory O(n^2); the leaves of up to 300 rows are
    put in the best of the tree's orders (Bar-Joseph et al. 2001, doi:10.1093/bioinformatics/17.suppl_1.S22).
    """
    if len(values) < 3 or values.shape[1] == 0:
        return list(range(len(values)))
    from scipy.cluster.hierarchy import leaves_list, linkage

    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    means = np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1)
    filled = np.where(known, values, means)
    tree = linkage(filled, method="average", optimal_ordering=len(values) <= 300)
    return [int(leaf) for leaf in leaves_list(tree)]


def _scores_of(version: ShownVersion, group: str) -> Mapping[str, SkillScore]:
    profile = version.profile
    scores: Mapping[str, SkillScore] = getattr(profile, group) if profile else {}
    return scores


def _plain(interval: Interval) -> Sequence[float]:
    return [_round(interval.score), _round(interval.low), _round(interval.high), interval.n]


def _round(value: float) -> float:
    return round(float(value), 4)
