"""Category classifiers over prompt embeddings: fitted by scikit-learn, applied by numpy.

Both give probabilities [n, c] from embeddings [n, d].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["Knn", "Logistic"]

Floats64 = NDArray[np.float64]
_STRENGTHS = (1.0, 10.0, 100.0)
"""Inverse penalties tried. Embeddings have length 1, where scikit-learn's own 1 is often too strong a penalty."""
_FOLDS = 3


@dataclass(frozen=True)
class Logistic:
    """softmax(e W^T + b): weights [c, d], bias [c]."""

    weights: Floats64
    bias: Floats64

    @classmethod
    def fit(cls, rows: Floats, labels: NDArray[np.int64], count: int) -> Logistic:
        """Of the penalties the one with the least cross-validated log loss; 10 where a category has fewer rows than
        folds. Every category has a row. Time O(7 fits)."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold

        if count == 1:
            return cls(np.zeros((1, rows.shape[1])), np.zeros(1))

        def fitted(part: NDArray[Any], strength: float) -> Logistic:
            found = LogisticRegression(C=strength, max_iter=1000).fit(rows[part], labels[part])
            weights, bias = np.asarray(found.coef_, np.float64), np.asarray(found.intercept_, np.float64)
            if count == 2:  # given as one row, for the second category
                weights, bias = np.vstack([0 * weights, weights]), np.r_[0.0, bias]
            return cls(weights, bias)

        strength = 10.0
        if np.bincount(labels).min() >= _FOLDS:
            folds = list(StratifiedKFold(_FOLDS).split(rows, labels))
            losses = [
                sum(_log_loss(fitted(part, tried).probabilities(rows[left]), labels[left]) for part, left in folds)
                for tried in _STRENGTHS
            ]
            strength = _STRENGTHS[int(np.argmin(losses))]
        return fitted(np.arange(len(rows)), strength)

    def probabilities(self, rows: Floats) -> Floats64:
        logits = rows.astype(np.float64) @ self.weights.T + self.bias
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        found: Floats64 = raised / raised.sum(axis=1, keepdims=True)
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"classifier.weights": self.weights, "classifier.bias": self.bias}

    @classmethod
    def restored(cls, tensors: Mapping[str, NDArray[Any]]) -> Logistic:
        return cls(tensors["classifier.weights"], tensors["classifier.bias"])


@dataclass(frozen=True)
class Knn:
    """The categories of the nearest training prompts, each voting with its cosine, and one vote for how often each
    category comes: rows [m, d], labels [m], shares [c]."""

    rows: Floats
    labels: NDArray[np.int64]
    shares: Floats64
    neighbours: int

    @classmethod
    def fit(cls, rows: Floats, labels: NDArray[np.int64], count: int, neighbours: int) -> Knn:
        return cls(rows, labels, np.bincount(labels, minlength=count) / len(labels), neighbours)

    def probabilities(self, rows: Floats) -> Floats64:
        k = min(self.neighbours, len(self.rows))
        # Rounded, and ties by place, so that the last bits of a product do not choose the neighbours.
        cosines = np.maximum(np.round(rows @ self.rows.T, 5).astype(np.float64), 0)
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        votes = np.zeros((len(rows), len(self.shares))) + self.shares
        for column in nearest.T:
            np.add.at(votes, (np.arange(len(rows)), self.labels[column]), cosines[np.arange(len(rows)), column])
        found: Floats64 = votes / votes.sum(axis=1, keepdims=True)
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"classifier.rows": self.rows, "classifier.labels": self.labels, "classifier.shares": self.shares}

    @classmethod
    def restored(cls, tensors: Mapping[str, NDArray[Any]], neighbours: int) -> Knn:
        rows, labels, shares = (tensors[f"classifier.{name}"] for name in ("rows", "labels", "shares"))
        return cls(rows, labels, shares, neighbours)


def _log_loss(probabilities: Floats64, labels: NDArray[np.int64]) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).sum())
