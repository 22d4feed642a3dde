"""The Bradley-Terry model: strengths out of who beat whom.

P(a beats b) = s(t_a - t_b), with s the logistic function and t a strength for each system. A tie is half a win for
either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.ranking.contests import Contests

__all__ = ["PRIOR", "Strengths", "bradley_terry", "strengths_of"]

PRIOR = 1.0
LEAST_PRIOR = 1e-6
"""What is less, but not nothing, no longer holds the undefeated within what float64 tells apart."""

STEPS = 200
CLOSE = 1e-9


@dataclass(frozen=True)
class Strengths:
    """System -> strength in log-odds, highest first; they add up to zero. `errors`: standard errors of the strengths,
    out of the model's curvature, the prior's included. `components`: groups between which nobody met anybody."""

    strengths: Mapping[str, float]
    errors: Mapping[str, float]
    contests: int
    components: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]


def bradley_terry(contests: Contests, *, prior: float = PRIOR) -> Strengths:
    """The strengths of highest likelihood, each system having met one of strength zero in `prior` drawn contests more.

    That keeps the undefeated finite and draws the little known towards the middle. With `prior=0` it is the plain
    model, which has an answer only where every system has beaten, by a chain of wins, every other: raises BadInput
    where not. Newton's method with halved steps; time O(n^3) a step, some ten steps.
    Source: Bradley and Terry 1952; Zermelo 1929.
    """
    if prior != 0 and not LEAST_PRIOR <= prior < math.inf:
        raise BadInput(f"the prior is {prior:g}", hint=f"it counts contests: 0, or {LEAST_PRIOR:g} and more")
    wins = contests.wins()
    n = len(wins)
    if n == 0:
        return Strengths({}, {}, 0, (), ())
    components = _reached_by(wins + wins.T > 0)
    if prior == 0:
        _check_answer(wins, contests.systems)
    fitted = _fit(wins[None], prior)
    errors = _errors(wins[None], fitted, prior)
    strengths = fitted[0] - fitted[0].mean()
    order = sorted(range(n), key=lambda number: (-strengths[number], contests.systems[number]))
    named = tuple(tuple(contests.systems[number] for number in group) for group in components)
    return Strengths(
        {contests.systems[number]: float(strengths[number]) for number in order},
        {contests.systems[number]: float(errors[number]) for number in order},
        int(contests.count.sum()),
        named,
        _apart(named),
    )


def strengths_of(wins: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    """wins [draws, n, n] -> strengths [draws, n], each draw's adding up to zero; a prior above 0."""
    fitted = _fit(wins, prior)
    centred: NDArray[np.float64] = fitted - fitted.mean(axis=1, keepdims=True)
    return centred


def _fit(wins: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    """wins [draws, n, n] -> strengths [draws, n], as the prior (or, without one, the start at zero) places them."""
    met = wins + wins.transpose(0, 2, 1)
    strengths = np.zeros(wins.shape[:2])
    best = _likelihood(wins, strengths, prior)
    for _ in range(STEPS):
        gradient, curvature = _slopes(wins, met, strengths, prior)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # A full step may overshoot where wins are one-sided: halve it, draw by draw, until the likelihood rises.
        scale = np.ones(len(wins))
        for _ in range(50):
            tried = strengths + scale[:, None] * step
            found = _likelihood(wins, tried, prior)
            worse = found < best - 1e-12 * np.abs(best)
            if not worse.any():
                break
            scale = np.where(worse, scale / 2, scale)
        strengths, best = tried, found
        if np.abs(scale[:, None] * step).max(initial=0.0) < CLOSE:
            break
    return strengths


def _likelihood(wins: NDArray[np.float64], strengths: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    difference = strengths[:, :, None] - strengths[:, None, :]
    found = -(wins * np.logaddexp(0.0, -difference)).sum(axis=(1, 2))
    drawn = np.logaddexp(0.0, -strengths) + np.logaddexp(0.0, strengths)
    total: NDArray[np.float64] = found - prior / 2 * drawn.sum(axis=1)
    return total


def _slopes(
    wins: NDArray[np.float64], met: NDArray[np.float64], strengths: NDArray[np.float64], prior: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The likelihood's gradient [draws, n] and its negative curvature [draws, n, n], made definite along the shift of
    all strengths that the likelihood without a prior does not see."""
    n = wins.shape[1]
    chance = _logistic(strengths[:, :, None] - strengths[:, None, :])
    alone = _logistic(strengths)
    gradient = (wins - met * chance).sum(axis=2) + prior * (0.5 - alone)
    weight = met * chance * (1 - chance)
    own = weight.sum(axis=2) + prior * alone * (1 - alone)
    curvature = -weight + own[..., None] * np.eye(n)
    if prior == 0:
        curvature = curvature + 1.0 / n
    return gradient, curvature


def _errors(wins: NDArray[np.float64], fitted: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    n = wins.shape[1]
    _, curvature = _slopes(wins, wins + wins.transpose(0, 2, 1), fitted, prior)
    centre = np.eye(n) - 1.0 / n
    variance = np.diag(centre @ np.linalg.inv(curvature[0]) @ centre)
    found: NDArray[np.float64] = np.sqrt(np.maximum(variance, 0.0))
    return found


def _logistic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(x / 2))
    return found


def _reached_by(edges: NDArray[np.bool_]) -> list[list[int]]:
    """Connected components of an undirected graph [n, n]."""
    left = set(range(len(edges)))
    found = []
    while left:
        group = _reach(edges, min(left))
        found.append(sorted(group))
        left -= group
    return found


def _reach(edges: NDArray[np.bool_], start: int) -> set[int]:
    reached, new = {start}, [start]
    while new:
        near = {int(b) for a in new for b in np.flatnonzero(edges[a])} - reached
        reached |= near
        new = sorted(near)
    return reached


def _check_answer(wins: NDArray[np.float64], systems: tuple[str, ...]) -> None:
    everyone = set(range(len(wins)))
    for edges, what in ((wins.T > 0, "beaten"), (wins > 0, "lost to")):
        missing = everyone - _reach(edges, 0)
        if missing:
            raise BadInput(
                f"without a prior there is no answer: {systems[min(missing)]} has never, even by a chain, "
                f"{what} {systems[0]}",
                hint="use a prior above 0",
            )


def _apart(components: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    if len(components) < 2:
        return ()
    told = " | ".join(", ".join(group[:4]) + (", ..." if len(group) > 4 else "") for group in components[:5])
    more = " | ..." if len(components) > 5 else ""
    return (f"nobody met anybody across these groups, so only the prior compares them: {told}{more}",)
