"""The linear datamodeling score: how well summed scores of rows foretell what training on subsets of them does.

For M random subsets, the predicted effect of a subset is the sum of its rows' scores, the true one how far training
on it lowers a target's loss. The score is the Spearman correlation of the two over the subsets, averaged over targets.
Source: Park et al. 2023 (TRAK), arXiv:2303.14186; Ilyas et al. 2022, arXiv:2202.00622.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "agreement", "datamodeling_score", "random_control", "score_interval", "spearman"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds that hold it in 95 of 100 resamplings."""

    value: float
    low: float
    high: float


def spearman(a: Doubles, b: Doubles) -> Doubles:
    """Rank correlations [...] over the last axis [..., M], ties at their mean rank; 0 where either is constant."""
    from scipy.stats import rankdata

    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (rankdata(a, axis=-1), rankdata(b, axis=-1)))
    lengths = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.asarray(np.divide((x * y).sum(axis=-1), lengths, out=np.zeros(lengths.shape), where=lengths > 0))


def datamodeling_score(predicted: Doubles, effects: Doubles) -> float:
    """The score of predictions [T, M] for T targets and M subsets, given the true effects [T, M]."""
    return float(spearman(predicted, effects).mean())


def score_interval(predicted: Doubles, effects: Doubles, rng: np.random.Generator, resamples: int = 2000) -> Interval:
    """The score, and its 95 % interval over subsets drawn with replacement."""
    chosen = rng.integers(0, predicted.shape[1], (resamples, predicted.shape[1]))
    scores = spearman(predicted[:, chosen], effects[:, chosen]).mean(axis=0)
    low, high = np.quantile(scores, (0.025, 0.975))
    return Interval(datamodeling_score(predicted, effects), float(low), float(high))


def random_control(
    members: NDArray[np.bool_], effects: Doubles, rng: np.random.Generator, draws: int = 2000
) -> Interval:
    """What scores without any meaning reach: the mean over `draws` of normal scores, and where 95 % of them lie.

    members [M, n]: which rows are in which subset.
    """
    scores = rng.standard_normal((draws, len(effects), members.shape[1])) @ members.T.astype(np.float64)
    found = spearman(scores, np.broadcast_to(effects, scores.shape)).mean(axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(found.mean()), float(low), float(high))


def agreement(effects: Doubles) -> float | None:
    """How well the mean of S trainings [S, T, M] would repeat, 0 to 1; None of one training alone.

    The mean rank correlation of two trainings r gives S r / (1 + (S - 1) r) for their mean (Spearman-Brown). No
    method can be expected to score above its root.
    """
    trainings = len(effects)
    if trainings < 2:
        return None
    pairs = [spearman(effects[i], effects[j]).mean() for i in range(trainings) for j in range(i)]
    one = max(0.0, float(np.mean(pairs)))
    return trainings * one / (1 + (trainings - 1) * one)
