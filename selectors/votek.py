"""Vote-k: rows that many others have among their nearest neighbours, with less say for those already heard."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._ranked import best_first
from xpert.selectors._scoring import check_scorer, prepared_scorer, scorer_settings
from xpert.similarity import nearest

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "Votes"]

Ints = NDArray[np.int64]

MOST_NEIGHBOURS = 150
FIRST = 0.1
"""Stage full: the share of the budget that votes alone choose."""
UNCERTAIN = 0.9
"""Stage full: the share of the pool, most uncertain first, that is cut into buckets."""


@dataclass(frozen=True)
class VoteKOptions(Config):
    neighbours: int | None = option(
        None, "how many nearest neighbours each row votes for; default: 150, and at most a tenth of the pool", minimum=1
    )
    stage: str = option(
        "fast",
        "fast: votes alone; full: a tenth of the budget by votes, then the best by votes in each of as many equal "
        "buckets as rows are left to take, the buckets cut from the most uncertain 90 % of the pool",
        choices=("fast", "full"),
    )
    uncertainty: str = option("perplexity", "stage full: the scorer whose greatest values are the most uncertain rows")
    uncertainty_params: str = option("", "stage full: parameters of that scorer, as KEY=VALUE,KEY=VALUE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage == "full":
            check_scorer(self.uncertainty, self.uncertainty_params)
        elif self.uncertainty != "perplexity" or self.uncertainty_params:
            raise BadInput("uncertainty has no part in stage fast", hint="leave it out, or take stage=full")

    def to_dict(self) -> dict[str, Any]:
        """With the scorer's own settings, which may hold the content of a file."""
        full = self.stage == "full"
        found = scorer_settings(self.uncertainty, self.uncertainty_params) if full else {}
        return {**super().to_dict(), "uncertainty_options": found}


class VoteK:
    """Always the row with the most votes, a voter counting 10^-t once t rows it voted for are taken.

    embeddings [n, d], unit rows: every row votes for its k nearest others -> rows in the order taken. Score: the sum
    over the row's voters that are not taken of 10^-t. Ties go to the row with more voters, then to the lowest index;
    rows nobody votes for come last. Votes are counted in whole numbers, so equal ones are equal, and the graph is
    exact: an approximate one changes nearly every pick.

    Stage full asks a scorer how uncertain each row is (rows that it cannot score are taken to be certain) and takes
    one row of each bucket, the most uncertain bucket first; what is left of the budget then goes to the best by votes
    of all. Here a row's uncertainty is of its own answer, by default under the base model without examples before it,
    where the paper puts the rows of the first stage before it. Votes are brought up to date in the second stage as
    well: the released code does not (keys read back from its JSON cache are strings).
    """

    Options: ClassVar[type[Config]] = VoteKOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = (
        "an exact neighbour graph: time O(n^2 d), memory O(n k); then O(k) a vote counted; full: the scorer on all rows"
    )
    source: ClassVar[str] = "Selective Annotation Makes Language Models Better Few-Shot Learners, arXiv:2209.01975"

    def __init__(self, options: VoteKOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        wanted = self.options.neighbours or max(1, min(MOST_NEIGHBOURS, len(embeddings) // 10))
        _, neighbours = nearest(embeddings, embeddings, wanted, skip_self=True)
        votes = Votes(neighbours)
        log: list[dict[str, Any]] = [{"step": "graph", "neighbours": neighbours.shape[1], "found by": "exact search"}]
        words = ""
        if self.options.stage == "full":
            scorer = prepared_scorer(self.options.uncertainty, self.options.uncertainty_params, features, shots, rng)
            everything = np.arange(len(embeddings), dtype=np.int64)
            uncertainty = scorer.score(everything)
            log.append(_first_stage(votes, meter))
            log.append(_buckets(votes, best_first(uncertainty), meter))
            log[-1]["not scored"] = int(np.isnan(uncertainty).sum())
            words = f", {self.options.uncertainty} "
        votes.take(meter)
        rows = np.array(votes.rows, dtype=np.int64)
        reasons = [
            f"{score:.4g} votes left of {votes.voters(row)}" + (words and words + scorer.explain(row))
            for row, score in zip(votes.rows, votes.scores, strict=True)
        ]
        return Selection(rows, np.array(votes.scores, dtype=np.float32), reasons, log)


class Votes:
    """neighbours [n, k], each row's votes -> `rows` taken in order and the `scores` they had.

    Scores are exact: whole numbers of a power of ten, kept by limbs of as many digits as no sum of 64 bits overflows.
    t never passes k, for it counts a voter's own neighbours that are taken.
    """

    def __init__(self, neighbours: Ints) -> None:
        rows, k = neighbours.shape
        chosen = neighbours.ravel()
        counts = np.bincount(chosen, minlength=rows)
        # Few distinct small numbers: numpy sorts 16 bits by radix, so it goes by the low half, then by the high one.
        order = np.argsort(chosen.astype(np.uint16), kind="stable")
        order = order[np.argsort((chosen[order] >> 16).astype(np.uint16), kind="stable")]
        self._voters: Ints = order // max(1, k)
        self._starts: list[int] = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._heard = np.zeros(rows, dtype=np.int64)  # t of each voter
        self._taken = np.zeros(rows, dtype=bool)
        self._gone = np.zeros(rows, dtype=bool)  # taken, or they do not fit the budget
        digits = 18 - len(str(counts.max(initial=1)))
        self._limb: int = 10**digits
        self._powers = 10 ** np.arange(digits - 1, -1, -1, dtype=np.int64)
        self._weights = np.zeros((k // digits + 1, rows), dtype=np.int64)  # limb of t, voter
        self._weights[0] = self._powers[0]
        self._used = 1
        self._whole = int(self._powers[0]) * self._limb ** (len(self._weights) - 1)
        self.rows: list[int] = []
        self.scores: list[float] = []

    def voters(self, row: int) -> int:
        return self._starts[row + 1] - self._starts[row]

    def _of(self, row: int) -> Ints:
        return self._voters[self._starts[row] : self._starts[row + 1]]

    def count(self, row: int) -> int:
        """The row's score now, `_whole` standing for 1. Time O(its voters)."""
        voters = self._of(row)
        total: int = 0
        for weights in self._weights[: self._used]:
            total = total * self._limb + int(weights[voters].sum())
        whole: int = total * self._limb ** (len(self._weights) - self._used)
        return whole

    def take(self, meter: BudgetMeter, until: int | None = None) -> None:
        """Takes the best row of all, again and again, until the meter is full or `until` is spent.

        Scores never rise, so a score counted before bounds what it is now, and few are counted anew.
        """
        left = np.flatnonzero(~self._gone).tolist()
        start = 0 if not self.rows else -1
        heap = [(-self.voters(row) * self._whole, -self.voters(row), row, start) for row in left]
        heapq.heapify(heap)
        while heap and not meter.full and (until is None or meter.spent < until):
            negative, voters, row, when = heap[0]
            if when < len(self.rows):
                heapq.heapreplace(heap, (-self.count(row), voters, row, len(self.rows)))
                continue
            heapq.heappop(heap)
            self._put(row, -negative, meter)

    def take_of(self, bucket: Iterable[int], meter: BudgetMeter) -> None:
        """Takes the best of the bucket's rows that fits."""
        left = [row for row in bucket if not self._gone[row]]
        for negative, _, row in sorted((-self.count(row), -self.voters(row), row) for row in left):
            if self._put(row, -negative, meter):
                return

    def _put(self, row: int, count: int, meter: BudgetMeter) -> bool:
        self._gone[row] = True
        if not meter.take(row):
            return False
        self._taken[row] = True
        voters = self._of(row)
        self._heard[voters] += 1
        voters = voters[~self._taken[voters]]
        limb, place = np.divmod(self._heard[voters], len(self._powers))
        self._used = max(self._used, int(limb.max(initial=0)) + 1)
        self._weights[: self._used, voters] = 0
        self._weights[:, row] = 0
        self._weights[limb, voters] = self._powers[place]
        self.rows.append(row)
        self.scores.append(count / self._whole)
        return True

    def left(self, order: Ints) -> Ints:
        """Those of `order` that may still be taken."""
        return order[~self._gone[order]]


def _first_stage(votes: Votes, meter: BudgetMeter) -> dict[str, Any]:
    votes.take(meter, until=max(1, int(FIRST * meter.limit)))
    return {"step": "by votes", "rows": len(votes.rows)}


def _buckets(votes: Votes, order: Ints, meter: BudgetMeter) -> dict[str, Any]:
    """One row of each bucket; `order` are all rows, the most uncertain first."""
    left = votes.left(order)
    uncertain = left[: max(1, int(UNCERTAIN * len(left)))]
    # Of a token budget it is an estimate how many rows it will take.
    cost = 1.0 if meter.costs is None or not len(left) else float(meter.costs[left].mean())
    count = max(1, min(round(meter.left / max(cost, 1e-9)), len(uncertain)))
    before = len(votes.rows)
    for bucket in np.array_split(uncertain, count):
        if meter.full:
            break
        votes.take_of(bucket.tolist(), meter)
    return {"step": "by buckets", "buckets": count, "rows": len(votes.rows) - before}


PLUGIN = VoteK
