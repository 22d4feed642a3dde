"""Determinantal point process: rows that span the greatest volume together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Floats, Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import fitting, similarities
from xpert.selectors._scaling import scaled
from xpert.selectors._scoring import check_scorer, prepared_scorer, scorer_settings
from xpert.selectors._spreading import top

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "Volume"]

Doubles = NDArray[np.float64]

HELD = 96
"""How many of the best rows are held at once; results do not depend on it."""
FLAT = 1e-5
"""A row of a smaller share outside the span of those taken adds no volume that float32 could tell from none."""
_ERROR = 3e-7
"""By how much a float32 product of unit vectors may be wrong."""
NEAR = 32
"""How many times as many are kept up to date with each change; the others are only now and then."""
_BLOCK = 4096


@dataclass(frozen=True)
class DPPOptions(Config):
    ridge: float = option(
        0.01,
        "added to each row's likeness with itself: rows go on adding volume when as many as there are dimensions are "
        "taken (0: the plain linear kernel, which cannot tell rows apart from there on)",
        minimum=0,
    )
    quality: str | None = option(None, "a scorer whose values weigh in, scaled to 0..1 over the pool; default: none")
    quality_params: str = option("", "parameters of that scorer, as KEY=VALUE,KEY=VALUE")
    theta: float = option(0.5, "weight of quality; 1 - theta is that of the volume's logarithm", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality is not None:
            check_scorer(self.quality, self.quality_params)
        elif self.quality_params or self.theta != 0.5:
            raise BadInput("theta and quality-params have no part without quality", hint="give quality=SCORER as well")

    def to_dict(self) -> dict[str, Any]:
        """With the scorer's own settings, which may hold the content of a file."""
        found = {} if self.quality is None else scorer_settings(self.quality, self.quality_params)
        return {**super().to_dict(), "quality_options": found}


class DPP:
    """The greedy most probable set of a determinantal point process: each next row adds the most volume.

    embeddings [n, d], unit rows, S = E E^T + ridge * I -> rows in the order taken; each is the one with the greatest
    theta * quality + (1 - theta) * log(det S with it / det S without it). That is log det of L = Q S Q with
    Q = exp(theta / (2 (1 - theta)) * quality). Score: that value. Without quality all unit rows tie for the first
    place: the one nearest to the mean of all rows is taken, then the lowest index.

    The linear kernel has no more than d dimensions, so without a ridge the determinant is 0 from d + 1 rows on. With a
    ridge the further rows are those the earlier ones explain least (the greatest posterior variance of a linear model
    with noise `ridge`). With ridge=0, once no row adds volume, the best by quality that are left follow, or else those
    of the lowest index; the log counts them.

    Exact: the sequence of Chen's recursion, but for rows that differ by less than rounding.
    """

    Options: ClassVar[type[Config]] = DPPOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = "time O(n d b) in few matrix products, memory O(n + d^2); b rows taken"
    source: ClassVar[str] = "Chen, Zhang, Zhou 2018, arXiv:1709.05135; Kulesza and Taskar 2012, arXiv:1207.6083"

    block: int = HELD

    def __init__(self, options: DPPOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        bonus, weight = np.zeros(len(embeddings)), 1.0
        words = [""] * len(embeddings)
        name, theta = self.options.quality, self.options.theta
        if name is not None:
            scorer = prepared_scorer(name, self.options.quality_params, features, shots, rng)
            everything = np.arange(len(embeddings), dtype=np.int64)
            bonus, weight = theta * scaled(scorer.score(everything)), 1 - theta
            words = [f"; {name}: {scorer.explain(row)}" for row in range(len(embeddings))]
        volume = Volume(embeddings, self.options.ridge, bonus, weight, held=self.block)
        volume.take(meter)
        rows = volume.rows
        reasons = [f"{share:.4g} of it lies outside what was taken before" for share in volume.shares]
        rest = meter.walk(np.argsort(-bonus, kind="stable").tolist())
        scores = [*volume.values, *(bonus[row] + weight * np.log(FLAT) for row in rest)]
        reasons += ["adds no volume to the rows taken before"] * len(rest)
        log = [{"step": "volume", "rows": len(rows), "log det": round(float(np.log(volume.shares).sum()), 4)}]
        if rest:
            log.append({"step": "no volume left", "rows": len(rest)})
        rows = rows + rest
        reasons = [reason + words[row] for row, reason in zip(rows, reasons, strict=True)]
        return Selection(np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32), reasons, log)


class Volume:
    """embeddings [n, d]; bonus [n] and weight: a row's value is bonus + weight * log(its share outside the span).

    `rows`, `shares` and `values` follow the order taken. A share never rises, so what it was bounds what it is. The
    `held` best rows are kept apart: with what is left of them outside the span of the rows taken before, [held, held],
    Chen's recursion runs among them for as long as their best is above all others' bounds. Then a matrix product
    brings the `NEAR` times as many next best up to date, and all rows only where those do not suffice. What the span
    leaves of any vector v is M v with M [d, d], so rows taken long ago cost nothing any more.
    """

    def __init__(
        self, embeddings: Floats, ridge: float, bonus: Doubles, weight: float = 1.0, *, held: int = HELD
    ) -> None:
        self.embeddings, self.ridge, self.bonus, self.weight, self.held = embeddings, ridge, bonus, weight, held
        d = embeddings.shape[1]
        self._outside = np.eye(d)  # M
        # Unit rows are of length 1 and no more or less by rounding: they tie. Empty rows are of length 0.
        self._own = np.round(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64), 6)
        self._shares = self._own + ridge
        self._gone = np.zeros(len(embeddings), dtype=bool)
        self.rows: list[int] = []
        self.shares: list[float] = []
        self.values: list[float] = []

    def take(self, meter: BudgetMeter) -> None:
        """Takes rows until the meter is full or no row adds volume."""
        everything = np.arange(len(self._gone), dtype=np.int64)
        pending = [self._first(meter)]  # what the rows that are not near do not know yet
        near = np.empty(0, dtype=np.int64)
        while not meter.full:
            known = self._shares[near]
            self._bring_up_to_date(everything, self.embeddings, np.concatenate(pending, axis=1))
            self._shares[near] = known
            near, bound = self._best_of(everything, NEAR * self.held, meter)
            vectors, pending, first = self.embeddings[near], [], -np.inf
            while not meter.full:
                hold, others = self._best_of(near, self.held, meter)
                fresh = self._among(hold, first, max(bound, others), meter)
                if fresh is None:
                    break
                pending.append(fresh)
                self._bring_up_to_date(near, vectors, fresh)
                first = bound
            if not pending:
                return

    def _best_of(self, rows: NDArray[np.int64], count: int, meter: BudgetMeter) -> tuple[NDArray[np.int64], float]:
        """The `count` best of these rows, and the greatest value that any other of them may have."""
        known = self._shares[rows]
        # Each of the t products subtracted was wrong by _ERROR, its square by 2 |product| _ERROR.
        lost = np.maximum(self._own[rows] + self.ridge - known, 0)
        slack = 2 * _ERROR * np.sqrt(len(self.rows) * lost) + 1e-13 * len(self.rows)
        least, most = self._value(known - slack, rows), self._value(known + slack, rows)
        gone = self._gone[rows] | ~fitting(meter, len(self._gone))[rows]
        least[gone] = most[gone] = -np.inf
        # All that may be the best are among them; where they are very many, they tie but for rounding.
        maybe = int(np.count_nonzero(most >= least.max(initial=-np.inf)))
        best = top(most, min(max(count, maybe), 4 * count))
        best = best[most[best] > -np.inf]
        found = rows[best]
        most[best] = -np.inf
        return found, float(most.max(initial=-np.inf))

    def _value(self, shares: Doubles, rows: NDArray[np.int64] | slice = slice(None)) -> Doubles:
        values = self.bonus[rows] + self.weight * np.log(np.maximum(shares, FLAT))
        values[shares < FLAT] = -np.inf
        return values

    def _first(self, meter: BudgetMeter) -> Doubles:
        """Takes the first row; its vector [d, 1] of the span."""
        values = self._value(self._shares)
        values[~fitting(meter, len(values))] = -np.inf
        if values.max() == -np.inf:
            return np.empty((self.embeddings.shape[1], 0))
        mean = self.embeddings.mean(axis=0, dtype=np.float64)[None].astype(np.float32)
        tied = values >= values.max() - 1e-9
        row = int(np.where(tied, similarities(self.embeddings, mean)[:, 0], -np.inf).argmax())
        meter.take(row)
        self._put(row, float(self._shares[row]), float(values[row]))
        return self._learn(self.embeddings[row].astype(np.float64)[:, None] / np.sqrt(self._shares[row]))

    def _learn(self, fresh: Doubles) -> Doubles:
        self._outside -= fresh @ fresh.T
        return fresh

    def _put(self, row: int, share: float, value: float) -> None:
        self._gone[row] = True
        self.rows.append(row)
        self.shares.append(share)
        self.values.append(value)

    def _bring_up_to_date(self, rows: NDArray[np.int64], vectors: Floats, fresh: Doubles) -> None:
        """`fresh` [d, b]: what the span has gained since these rows' shares were last known."""
        added, gained = fresh.astype(np.float32, order="F"), np.empty(len(vectors))
        for start in range(0, len(vectors), _BLOCK):
            inside = vectors[start : start + _BLOCK] @ added
            gained[start : start + _BLOCK] = np.einsum("nb,nb->n", inside, inside)
        self._shares[rows] -= gained

    def _among(self, hold: NDArray[np.int64], first: float, bound: float, meter: BudgetMeter) -> Doubles | None:
        """Takes held rows while they are surely the best of all; what they add to the span [d, b].

        A row must be worth more than `bound`; the best of the rows just brought up to date more than `first` alone.
        None where it is not.
        """
        vectors = self.embeddings[hold].astype(np.float64)
        left = vectors @ self._outside
        likeness = left @ vectors.T
        inside = np.einsum("nd,nd->n", vectors, vectors) - np.diagonal(likeness)
        shares = np.round(self._own[hold] + self.ridge - inside, 12)
        alive = np.ones(len(hold), dtype=bool)
        count = 0
        factors, span = np.empty((len(hold), len(hold))), np.empty((len(hold), vectors.shape[1]))
        offered = False
        while len(hold) and not meter.full:
            values = self._value(shares, hold)
            values[~alive] = -np.inf
            best = int(values.argmax())
            if values[best] <= (bound if offered else first):
                break
            offered, alive[best] = True, False
            row = int(hold[best])
            self._gone[row] = True
            if not meter.take(row):
                continue
            self._put(row, float(shares[best]), float(values[best]))
            root = np.sqrt(shares[best])
            known = factors[:count, best]
            factors[count] = (likeness[best] - known @ factors[:count]) / root
            span[count] = (left[best] - known @ span[:count]) / root
            shares = np.round(shares - factors[count] ** 2, 12)
            count += 1
        return self._learn(span[:count].T) if offered else None


PLUGIN = DPP
