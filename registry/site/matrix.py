"""Skills x experts: the table that the heat map and the comparison draw, as plain lists for the pages' script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.registry.card import Interval, SkillScore
from xpert.registry.site.data import Catalogue, ShownVersion
from xpert.registry.site.wording import place, shown

__all__ = [
    "GROUPS",
    "MOST_LIKENED",
    "Grid",
    "GridCell",
    "GridLine",
    "Matrix",
    "likeness_order",
    "member_grid",
    "skill_matrix",
]

GROUPS = ("skills", "clusters", "keywords")
MOST_LIKENED = 1_000
"""Experts up to which they are ordered by likeness, which takes time and memory by their square."""

MOST_MEMBERS = 24
MOST_SKILLS = 60

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
        """columns: [[skill, metric, suite]]; cells: one list a version, of [column, expert, base]."""
        return {
            "columns": [[shown(skill, 80), shown(metric, 40), suite] for skill, metric, suite in self.columns],
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
    return skill_matrix_of([v for name in found.names for v in (name.versions if every else (name.latest,))], group)


def skill_matrix_of(versions: Sequence[ShownVersion], group: str = "skills") -> Matrix:
    """The scores of these versions; those without any are left out."""
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


@dataclass(frozen=True)
class GridCell:
    """A score as a coloured cell: its class in site.css, its text, and what it says when pointed at."""

    kind: str = "none"
    text: str = ""
    told: str = ""
    best: bool = False


@dataclass(frozen=True)
class GridLine:
    skill: str
    metric: str
    cells: tuple[GridCell, ...]


@dataclass(frozen=True)
class Grid:
    """Skills x the experts of a mixture; `left_out` counts the skills beyond the first 60."""

    keys: tuple[str, ...] = ()
    lines: tuple[GridLine, ...] = ()
    left_out: int = 0


def member_grid(mixture: ShownVersion, versions: Mapping[str, ShownVersion]) -> Grid:
    """The scores of a mixture's experts side by side; empty where fewer than two have a profile."""
    members = mixture.mixture.members[:MOST_MEMBERS] if mixture.mixture else ()
    held = [(member.key, versions[member.ref]) for member in members if member.ref in versions]
    held = [(key, version) for key, version in held if version.profile]
    if len(held) < 2:
        return Grid()
    found = skill_matrix_of([version for _, version in held])
    lines = []
    for column, (skill, metric, _) in enumerate(found.columns):
        scores = [cells.get(column) for cells in found.cells]
        known = [score.expert.score for score in scores if score]
        top = max(known) if len(known) > 1 else math.inf
        lines.append(GridLine(shown(skill, 80), shown(metric, 40), tuple(_cell(score, top) for score in scores)))
    return Grid(tuple(shown(key, 80) for key, _ in held), tuple(lines[:MOST_SKILLS]), max(0, len(lines) - MOST_SKILLS))


def _cell(score: SkillScore | None, top: float) -> GridCell:
    if score is None:
        return GridCell(told="not scored")
    own = score.expert
    step = min(8, max(0, int(9 * own.score)))
    told = f"{own.score:.3f} [{own.low:.3f}, {own.high:.3f}], {own.n} items; base {score.base.score:.3f}"
    return GridCell(f"s{step}", f"{100 * own.score:.0f}", told, own.score == top)


def _scores_of(version: ShownVersion, group: str) -> Mapping[str, SkillScore]:
    profile = version.profile
    scores: Mapping[str, SkillScore] = getattr(profile, group) if profile else {}
    return scores


def _plain(interval: Interval) -> Sequence[float]:
    return [_round(interval.score), _round(interval.low), _round(interval.high), interval.n]


def _round(value: float) -> float:
    return round(float(value), 4)
