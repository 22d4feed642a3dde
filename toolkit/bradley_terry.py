"""A Bradley-Terry scorer: a linear function of vectors, fitted to pairs of them and shares of votes.

P(a before b) = sigmoid(w . (x_a - x_b)). A ridge-penalised linear fit, and not a network: it is convex, so that it has
one solution and needs no seed, and with some hundreds of pairs in some hundreds of dimensions a network has far more
freedom than the votes can hold down. Source: Bradley and Terry 1952; the loss is QuRating's, arXiv:2402.09739.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["STRENGTHS", "PairFit", "fit_pairs", "pair_accuracy", "solve"]

Matrix = NDArray[np.float64]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths tried, per pair, on differences of mean square length 1."""
_FOLDS = 4
_HELD_OUT = 0.2


@dataclass(frozen=True)
class PairFit:
    """weights [d]: the score of x is x . weights, and its zero means nothing.

    `accuracy` is the share of `held_out` pairs that are ordered as voted by a fit without them, ties counting half.
    """

    weights: Matrix
    strength: float
    pairs: int
    held_out: int
    accuracy: float


def fit_pairs(differences: Matrix, shares: Matrix, rng: np.random.Generator) -> PairFit:
    """Fits differences [m, d] = x_a - x_b to shares [m] of votes for a.

    A fifth of the pairs is held out to measure; the ridge strength is chosen on the others by 4-fold cross-validated
    loss; then all pairs are fitted. The caller sees to it that m is at least 10. Time about O(100 m d) a fit, 22 fits.
    """
    scale = float(np.sqrt(np.mean(np.sum(differences**2, axis=1)))) or 1.0
    x, p = np.asarray(differences, np.float64) / scale, np.asarray(shares, np.float64)
    order = rng.permutation(len(x))
    test, train = np.split(order, [max(1, round(_HELD_OUT * len(x)))])
    strength = _best_strength(x[train], p[train])
    accuracy = pair_accuracy(x[test] @ solve(x[train], p[train], strength), p[test])
    weights = solve(x, p, strength) / scale
    return PairFit(weights, strength, len(x), len(test), accuracy)


def _best_strength(x: Matrix, p: Matrix, strengths: Sequence[float] = STRENGTHS) -> float:
    fold = np.arange(len(x)) % min(_FOLDS, len(x))
    losses = []
    for strength in strengths:
        total = 0.0
        for held in np.unique(fold):
            weights = solve(x[fold != held], p[fold != held], strength)
            total += float(_losses(x[fold == held] @ weights, p[fold == held]).sum())
        losses.append(total)
    return strengths[int(np.argmin(losses))]


def solve(x: Matrix, p: Matrix, strength: float) -> Matrix:
    """The weights [d] that minimise mean BCE(sigmoid(x w), p) + strength / 2 * |w|^2."""
    from scipy.optimize import minimize

    def value(weights: Matrix) -> tuple[float, Matrix]:
        margins = x @ weights
        slope = x.T @ (_sigmoid(margins) - p) / len(x)
        return float(_losses(margins, p).mean() + strength / 2 * weights @ weights), slope + strength * weights

    start = np.zeros(x.shape[1])
    found: Any = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12})
    return np.asarray(found.x, np.float64)


def pair_accuracy(margins: Matrix, shares: Matrix) -> float:
    """The share of pairs ordered as voted; pairs voted one half are left out, equal scores count half."""
    decided = shares != 0.5
    if not decided.any():
        return float("nan")
    agreement = np.sign(margins[decided]) * np.sign(shares[decided] - 0.5)
    return float((agreement + 1).mean() / 2)


def _losses(margins: Matrix, p: Matrix) -> Matrix:
    return np.asarray(np.logaddexp(0, margins) - p * margins, np.float64)


def _sigmoid(margins: Matrix) -> Matrix:
    return np.asarray(0.5 * (1 + np.tanh(margins / 2)), np.float64)
