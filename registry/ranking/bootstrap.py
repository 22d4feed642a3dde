"""How sure an order is: the tasks drawn anew, and the scores too if asked, and everything ranked again.

The tasks stand for the work the experts are meant for; drawing them with replacement (Efron 1979) shows what of the
order hangs on which tasks happened to be in the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.ranking.consensus import best_of
from xpert.registry.ranking.contests import Contests, task_wins
from xpert.registry.ranking.means import tasks_to_mean
from xpert.registry.ranking.pairwise import PRIOR, strengths_of
from xpert.registry.ranking.points import ranks_of, task_points

__all__ = ["DIGITS", "DRAWS", "Noise", "Sureness", "again", "again_contests", "sureness"]

DRAWS = 1000
CELLS = 4_000_000
"""How many numbers of one block of draws are held at once."""

DIGITS = 9
"""Decimals of points that are ranked: what lies below is rounding of equal sums."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """What scores may be drawn from: sd [tasks, n] (NaN where there is no score) and the metric's limits."""

    sd: Floats
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Sureness:
    """Per system, over the draws: the middle 95 % of points and places, and how often it came first (ties share)."""

    low: Floats
    high: Floats
    place_low: Floats
    place_high: Floats
    first: Floats
    draws: int


def again(
    array: Floats,
    method: str,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    noise: Noise | None = None,
    mean_over: str = "common",
    prior: float = PRIOR,
) -> Floats:
    """scores [tasks, n] -> points [draws, n] of `method`, higher for better; Kemeny's are minus the places.

    Tasks are drawn with replacement, as many as there are, among those that tell something: those of two or more
    systems, or for the mean those it is taken over. With `noise`, each score is drawn from a normal distribution too
    and clipped to the limits. A system all of whose tasks were missed by a draw has NaN there.
    Time O(draws tasks n^2) at most, and for Kemeny a search in each draw,
    which beyond sixteen systems in a circle of majorities moves single systems only.
    """
    if draws < 1:
        raise BadInput(f"{draws} draws", hint="draw 1 or more; 1000 is usual")
    kept = tasks_to_mean(array, mean_over) if method == "mean" else np.isfinite(array).sum(axis=1) > 1
    array = array[kept]
    if noise is not None:
        noise = Noise(noise.sd[kept], noise.low, noise.high)
    points = {"borda": _borda, "mean": _mean, "bradley-terry": _bradley_terry(prior), "kemeny": _kemeny(seed)}[method]
    if not len(array):
        return np.zeros((draws, array.shape[1]))
    parts = [points(counts, scores) for counts, scores in _blocks(array, draws, np.random.default_rng(seed), noise)]
    return np.concatenate(parts)


def again_contests(contests: Contests, *, draws: int = DRAWS, seed: int = 0, prior: float = PRIOR) -> Floats:
    """Strengths [draws, n] by Bradley-Terry, the contests drawn with replacement; NaN for one that met nobody."""
    rng = np.random.default_rng(seed)
    total, n = int(contests.count.sum()), len(contests.systems)
    block = max(1, CELLS // max(1, n * n))
    parts = []
    for start in range(0, draws, block):
        counts = rng.multinomial(total, contests.count / total, size=min(block, draws - start))
        wins = np.stack([contests.wins(count) for count in counts])
        parts.append(_strengths(wins, prior))
    return np.concatenate(parts)


def sureness(points: Floats) -> Sureness:
    """points [draws, n], NaN where a draw says nothing of a system -> what they spread over."""
    ranks = ranks_of(np.round(points, DIGITS))
    best = ranks == np.nanmin(ranks, axis=1, keepdims=True)
    first = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = _middle(points, "linear", "linear")
    place_low, place_high = _middle(ranks, "lower", "higher")
    return Sureness(low, high, place_low, place_high, first, len(points))


_Method = Literal["linear", "lower", "higher"]


def _middle(values: Floats, low: _Method, high: _Method) -> tuple[Floats, Floats]:
    """The 2.5 % and 97.5 % quantiles over the draws that say something; NaN where none does."""
    bounds = np.full((2, values.shape[1]), np.nan)
    for system, column in enumerate(values.T):
        known = column[np.isfinite(column)]
        if len(known):
            bounds[0, system] = np.quantile(known, 0.025, method=low)
            bounds[1, system] = np.quantile(known, 0.975, method=high)
    return bounds[0], bounds[1]


def _blocks(
    array: Floats, draws: int, rng: np.random.Generator, noise: Noise | None
) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Blocks of draws: how often each task was drawn [b, tasks], and the scores [b or 1, tasks, n]."""
    tasks, n = array.shape
    block = max(1, CELLS // (n * n * (tasks if noise is not None else 1)))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        counts = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=size)
        scores = array[None]
        if noise is not None:
            drawn = array + noise.sd * rng.normal(size=(size, tasks, n))
            scores = np.clip(drawn, noise.low, noise.high)
        yield counts, scores


def _weighed(counts: NDArray[np.int64], values: Floats) -> Floats:
    """Sums over the tasks: counts [b, tasks], values [b or 1, tasks, ...] -> [b, ...]."""
    if len(values) == 1:
        flat: Floats = counts.astype(np.float64) @ values[0].reshape(len(values[0]), -1)
        return flat.reshape(len(counts), *values.shape[2:])
    found: Floats = np.einsum("bt,bt...->b...", counts, values)
    return found


def _over_known(counts: NDArray[np.int64], values: Floats) -> tuple[Floats, Floats]:
    """(sums over the tasks that are known of a system, how many those are), each [b, n]."""
    known = np.isfinite(values)
    return _weighed(counts, np.where(known, values, 0.0)), _weighed(counts, known.astype(np.float64))


def _borda(counts: NDArray[np.int64], scores: Floats) -> Floats:
    earned, own = _over_known(counts, task_points(scores))
    found: Floats = np.where(own > 0, earned * counts.sum(axis=1, keepdims=True) / np.maximum(own, 1), np.nan)
    return found


def _mean(counts: NDArray[np.int64], scores: Floats) -> Floats:
    total, own = _over_known(counts, scores)
    found: Floats = np.where(own > 0, total / np.maximum(own, 1), np.nan)
    return found


def _bradley_terry(prior: float) -> Callable[[NDArray[np.int64], Floats], Floats]:
    return lambda counts, scores: _strengths(_weighed(counts, task_wins(scores)), prior)


def _strengths(wins: Floats, prior: float) -> Floats:
    if prior <= 0:
        raise BadInput(
            "a draw may leave a system undefeated, so there are no intervals without a prior",
            hint="use a prior above 0, or no bootstrap",
        )
    met = (wins + wins.transpose(0, 2, 1)).sum(axis=2) > 0
    found: Floats = np.where(met, strengths_of(wins, prior), np.nan)
    return found


def _kemeny(seed: int) -> Callable[[NDArray[np.int64], Floats], Floats]:
    def points(counts: NDArray[np.int64], scores: Floats) -> Floats:
        above = (scores[..., :, None] > scores[..., None, :]).astype(np.float64)
        starts = np.argsort(-np.nan_to_num(_borda(counts, scores), nan=-1.0), axis=1, kind="stable")
        known = _over_known(counts, scores)[1] > 0
        places = np.full(known.shape, np.nan)
        rng = np.random.default_rng(seed)
        for draw, prefer in enumerate(_weighed(counts, above)):
            # Of equal orders the first by number is found, so systems are numbered anew: none profits by its name.
            numbers = rng.permutation(len(prefer))
            start = np.argsort(numbers)[starts[draw]]
            renumbered = np.rint(prefer[np.ix_(numbers, numbers)]).astype(np.int64)
            order, _ = best_of(renumbered, start, seed=seed, kicks=0, blocks=False)
            ranked = [system for system in numbers[order] if known[draw, system]]
            places[draw, ranked] = np.arange(1, len(ranked) + 1)
        return -places

    return points
