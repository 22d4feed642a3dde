"""The arms of a bandit: clusters, whose rows are scored a few at a time, and what their rewards say of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["Arms", "Ints", "Reals", "neighbours"]

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass
class Arms:
    """k arms over n rows: what was scored of each, and what that says of the rest.

    labels [n] in 0..k-1; `limit`, how many rows may be scored. Rows of an arm are scored in an order drawn at the
    start, none twice; arms without a row left are closed. `near` gives per arm the arms that learn from its rewards,
    itself among them, and with what weight; without it each learns for itself. `blocks`: a pull gives one reward, the
    mean of its rows, and not one a row. Rewards are measured from `tau`, or from that `quantile` of all scores so far,
    or, with neither, from their running mean. They enter arm j as R_j += w (r - tau), T_j += 1, kept so that tau may
    move. NaN scores are scored rows without a reward; an arm that gave nothing else is pulled after all others.
    """

    labels: Ints
    many: int
    score: Callable[[Ints], Floats]
    rng: np.random.Generator
    limit: int
    near: Sequence[tuple[Ints, Reals]] | None = None
    tau: float | None = None
    quantile: float | None = None
    blocks: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n, k = len(self.labels), self.many
        shuffled = self.rng.permutation(n)
        self._order = shuffled[np.argsort(self.labels[shuffled], kind="stable")].astype(np.int64)
        self.sizes = np.bincount(self.labels, minlength=k).astype(np.int64)
        self._start = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self.drawn = np.zeros(k, np.int64)
        # Among arms that look alike none is favoured for its number.
        self._turn = self.rng.permutation(k)
        self.scores = np.full(n, np.nan, np.float32)
        self._seen = np.zeros(n, bool)
        self.pulls = np.zeros(k, np.int64)
        # Sums are of rewards less the first one: equal rewards then have no spread at all.
        self._origin = 0.0
        self._sum, self._weight, self.count = np.zeros(k), np.zeros(k), np.zeros(k)
        self._rows, self._row_sum, self._row_squares = np.zeros(k), np.zeros(k), np.zeros(k)
        self.rounds = 0

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def evaluated(self) -> int:
        """How many rows were scored."""
        return int(self.drawn.sum())

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[n]: which rows were scored."""
        return self._seen

    @property
    def left(self) -> Ints:
        """[k]: how many rows of each arm were not scored yet."""
        return self.sizes - self.drawn

    @property
    def done(self) -> bool:
        return self.evaluated >= min(self.limit, len(self.labels))

    @property
    def spread(self) -> float:
        """Standard deviation of all rewards so far."""
        rows = self._rows.sum()
        if not rows:
            return 0.0
        mean = self._row_sum.sum() / rows
        return math.sqrt(max(0.0, self._row_squares.sum() / rows - mean**2))

    @property
    def level(self) -> float:
        """tau as it is now, on the scorer's scale; 0 before anything was scored."""
        rows = self._rows.sum()
        if self.tau is not None:
            return self.tau
        if not rows:
            return 0.0
        if self.quantile is None:
            return float(self._origin + self._row_sum.sum() / rows)
        return float(np.quantile(self.scores[np.isfinite(self.scores)].astype(np.float64), self.quantile))

    def means(self) -> Reals:
        """[k]: R_j / T_j, the arm's mean reward above tau; 0 where nothing is known."""
        above = self._sum - (self.level - self._origin) * self._weight
        return np.divide(above, self.count, out=np.zeros(self.many), where=self.count > 0)

    def spreads(self) -> Reals:
        """[k]: the standard deviation of each arm's own rewards, with that of all counted in as one more reward.

        So an arm of one reward has a spread, and arms of many have their own.
        """
        rows = np.maximum(self._rows, 1)
        own = np.maximum(self._row_squares - self._row_sum**2 / rows, 0)
        return np.asarray(np.sqrt((own + self.spread**2) / (self._rows + 1)))

    def beyond(self, share: float, *, normal: bool) -> Reals:
        """[k]: the part of each arm's rewards among the best `share` of all, counted or by a normal distribution.

        `share` itself where nothing is known of an arm.
        """
        known = np.flatnonzero(np.isfinite(self.scores))
        if not len(known):
            return np.full(self.many, share)
        bar = float(np.quantile(self.scores[known].astype(np.float64), 1 - share))
        if normal:
            mean = self._origin + np.divide(self._row_sum, self._rows, out=np.zeros(self.many), where=self._rows > 0)
            gap = np.divide(bar - mean, self.spreads(), out=np.zeros(self.many), where=self.spreads() > 0)
            tail: Reals = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in gap.tolist()])
            return np.asarray(np.where(self._rows > 0, tail, share), np.float64)
        best = np.bincount(self.labels[known], weights=self.scores[known] >= bar, minlength=self.many)
        return np.asarray(np.divide(best, self._rows, out=np.full(self.many, share), where=self._rows > 0))

    # ── pulling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def best(self, index: Reals, many: int) -> list[int]:
        """The `many` open arms of greatest index, those that gave no reward last."""
        barren = (self.drawn > 0) & (self._rows == 0)
        order = np.lexsort((self._turn, -index, barren, self.left == 0))
        return [int(arm) for arm in order[: min(many, int((self.left > 0).sum()))]]

    def pull(self, arms: Sequence[int], rows: int | Sequence[int], index: Reals | None = None) -> list[float]:
        """Scores the next `rows` rows of each arm, all in one call, within the limit; the mean reward of each pull.

        NaN for a pull that gave no reward. `index` is what the arms were chosen by, for the log.
        """
        wanted = [rows] * len(arms) if isinstance(rows, int) else rows
        parts = [self._draw(arm, count) for arm, count in zip(arms, wanted, strict=True)]
        self.rounds += 1
        if not sum(map(len, parts)):
            return [math.nan] * len(arms)
        found = np.asarray(self.score(np.concatenate(parts)), np.float32)
        rewards, begin = [], 0
        for arm, part in zip(arms, parts, strict=True):
            scores = found[begin : begin + len(part)]
            begin += len(part)
            self.scores[part] = scores
            rewards.append(self._learn(arm, scores[np.isfinite(scores)].astype(np.float64)))
        means, level = self.means(), self.level
        for arm, part, reward in zip(arms, parts, rewards, strict=True):
            if len(part):
                self.log.append(self._entry(arm, len(part), reward, means[arm] + level, index))
        return rewards

    def _draw(self, arm: int, count: int) -> Ints:
        begin = int(self.drawn[arm])
        end = begin + max(0, min(count, int(self.left[arm]), self.limit - self.evaluated))
        rows = self._order[self._start[arm] + begin : self._start[arm] + end]
        self.drawn[arm] = end
        self._seen[rows] = True
        self.pulls[arm] += bool(len(rows))
        return rows

    def _learn(self, arm: int, rewards: Reals) -> float:
        if not len(rewards):
            return math.nan
        if not self._rows.any():
            self._origin = float(rewards[0])
        moved = rewards - self._origin
        self._rows[arm] += len(moved)
        self._row_sum[arm] += moved.sum()
        self._row_squares[arm] += (moved**2).sum()
        total, count = (moved.mean(), 1) if self.blocks else (moved.sum(), len(moved))
        others, weights = self.near[arm] if self.near is not None else (np.array([arm]), np.ones(1))
        self._sum[others] += weights * total
        self._weight[others] += weights * count
        self.count[others] += count
        return float(moved.mean() + self._origin)

    def _entry(self, arm: int, rows: int, reward: float, mean: float, index: Reals | None) -> dict[str, Any]:
        return {
            "step": "pull",
            "round": self.rounds,
            "arm": arm,
            "pulls": int(self.pulls[arm]),
            "rows": rows,
            "reward": _plain(reward),
            "mean reward": _plain(mean) if math.isfinite(reward) else None,
            "index": None if index is None else _plain(float(index[arm])),
        }

    # ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────

    def unscored(self) -> Ints:
        """Rows not scored, those of the arm of greatest mean first, in an arm's own order as drawn."""
        arms = np.lexsort((self._turn, -self.means()))
        parts = [self._order[self._start[a] + self.drawn[a] : self._start[a] + self.sizes[a]] for a in arms]
        return np.concatenate(parts).astype(np.int64)

    def summary(self) -> list[dict[str, Any]]:
        """The log's end: an entry per arm that holds rows, then what was evaluated in all."""
        values = self.means() + self.level
        arms = [
            {
                "step": "arm",
                "arm": arm,
                "rows": int(self.sizes[arm]),
                "pulls": int(self.pulls[arm]),
                "scored": int(self.drawn[arm]),
                "mean reward": _plain(float(values[arm])) if self._rows[arm] else None,
            }
            for arm in np.flatnonzero(self.sizes).tolist()
        ]
        total = {
            "step": "evaluations",
            "scored": self.evaluated,
            "share": round(self.evaluated / len(self.labels), 6),
            "pulls": int(self.pulls.sum()),
            "not scorable": int((self._seen & ~np.isfinite(self.scores)).sum()),
        }
        return [*arms, total]


def neighbours(centroids: Floats, radius: float) -> list[tuple[Ints, Reals]]:
    """Per arm the arms within cosine distance d < radius of it and their weights 1 - d / radius; itself weighs 1.

    centroids [k, d] of length 1. Time O(k^2 d), memory O(k^2).
    """
    count = len(centroids)
    distances = np.maximum(1.0 - np.asarray(centroids @ centroids.T, np.float64), 0.0)
    np.fill_diagonal(distances, 0.0)
    found = []
    for arm in range(count):
        near = np.flatnonzero(distances[arm] < radius) if radius > 0 else np.array([arm])
        weights = 1.0 - distances[arm, near] / radius if radius > 0 else np.ones(1)
        found.append((near.astype(np.int64), weights))
    return found


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
