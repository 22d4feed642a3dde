"""Choosing among answers by which checks they pass, where the checks may be as wrong as the answers.

B4 (Chen et al. 2024, "B4: Towards Optimal Assessment of Plausible Code Solutions with Plausible Tests",
https://arxiv.org/abs/2409.08692): the Bayes optimal choice among groups of answers that pass the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RULES", "Group", "b4_score", "groups_of", "pass_matrix", "scored_groups"]

Passes = NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Answers with the same row of the pass matrix: `rows` are theirs, `checks` those that they pass."""

    rows: tuple[int, ...]
    checks: tuple[int, ...]


def groups_of(passes: Passes) -> list[Group]:
    """Groups of a pass matrix [answers, checks], in the order of their first rows."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, line in enumerate(passes):
        found.setdefault(tuple(np.flatnonzero(line).tolist()), []).append(row)
    return [Group(tuple(rows), checks) for checks, rows in found.items()]


def scored_groups(passes: Passes, rule: str, *, a_xy: float, b0: float) -> list[tuple[Group, float]]:
    """Groups with their scores by a rule of `RULES`, best first; of equal ones the larger, then the earlier."""
    scored = [(group, round(RULES[rule](passes, group, a_xy, b0), 9)) for group in groups_of(passes)]
    return sorted(scored, key=lambda pair: (-pair[1], -len(pair[0].rows), pair[0].rows))


def b4_score(passes: Passes, group: Group, a_xy: float, b0: float) -> float:
    """Log posterior of a group being the right one, up to a constant.

    passes bool [N, M]; x the group's answers, y the checks it passes:

        lnB(|y| + a_xy, M - |y| + 1) + lnB(|x| + a_xy, N - |x| + 1)
        + lnB(n1(E1) + 1, |E1| - n1(E1) + 1) + lnB(n1(E0) + 1, |E0| - n1(E0) + b0)

    E1: the other answers on the checks in y; E0: the other answers on all other checks; n1 counts ones. A large a_xy
    says that right answers and right checks are many, a large b0 that wrong answers seldom pass wrong checks.
    """
    answers, checks = passes.shape
    others = np.ones(answers, dtype=bool)
    others[list(group.rows)] = False
    in_y = np.zeros(checks, dtype=bool)
    in_y[list(group.checks)] = True
    e1, e0 = passes[np.ix_(others, in_y)], passes[np.ix_(others, ~in_y)]
    y, x = len(group.checks), len(group.rows)
    return (
        _ln_beta(y + a_xy, checks - y + 1)
        + _ln_beta(x + a_xy, answers - x + 1)
        + _ln_beta(int(e1.sum()) + 1, e1.size - int(e1.sum()) + 1)
        + _ln_beta(int(e0.sum()) + 1, e0.size - int(e0.sum()) + b0)
    )


def _max_pass(passes: Passes, group: Group, a_xy: float, b0: float) -> float:
    """Most checks passed."""
    return float(len(group.checks))


def _codet(passes: Passes, group: Group, a_xy: float, b0: float) -> float:
    """sqrt(|x|) |y|, CodeT (Chen et al. 2022, https://arxiv.org/abs/2207.10397)."""
    return math.sqrt(len(group.rows)) * len(group.checks)


def _ln_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


Rule = Callable[[Passes, Group, float, float], float]
RULES: dict[str, Rule] = {"b4": b4_score, "max-pass": _max_pass, "codet": _codet}


def pass_matrix(margins: Sequence[Sequence[float]]) -> Passes:
    """Margins log P(Yes) - log P(No) [answers, checks] -> who passes: those above 0."""
    return np.asarray(margins, dtype=np.float64) > 0
