"""Similarity to the shots first, then diversity among the rows kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import describe_shot, needs_shots, similarities
from xpert.selectors._repeats import RepeatWalk

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KShotOptions(Config):
    tau: float = option(
        0.9,
        "a row whose cosine with an earlier kept row is greater repeats it and is passed over",
        minimum=-1,
        maximum=1,
    )
    order: str = option(
        "nearest",
        "nearest: by the greatest cosine with any shot; turns: the shots choose their nearest rows in turn; "
        "mean: by the cosine with the shots' mean",
        choices=("nearest", "turns", "mean"),
    )
    refill: bool = option(
        True, "put other rows in the place of repeats until the budget is spent; off: take the budget, drop its repeats"
    )
    reach: float = option(
        1.5,
        "repeats are replaced by rows among the first reach x budget; where these do not suffice repeats come back, "
        "since a repeat of the task is worth more than a row far from it",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refill and self.reach != 1.5:
            raise BadInput("reach has no part without refill", hint="leave it out, or take refill=true")


class KShot:
    """Rows most like the shots first, near-repeats of better rows passed over, refilled to the budget.

    embeddings [n, d], shots [K, d], unit rows -> distinct rows in the order taken, then repeats brought back. Score:
    the greatest cosine with any shot (order `mean`: the cosine with the shots' mean). The paper's algorithm takes the
    budget by order `nearest` and drops its repeats (refill=false); its released code is order `mean`. That repeats come
    back before rows far from the task do was measured to serve much better: to a plain embedder all rows of one
    template look alike, and an unbounded refill (a great `reach`) leaves the task; see benchmarks/results.
    """

    Options: ClassVar[type[Config]] = KShotOptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "embeddings"})
    cost: ClassVar[str] = "time O(n K d + m b d), memory O(n K + b d); m rows walked for b taken"
    source: ClassVar[str] = "Leveraging Open Knowledge for Advancing Task Expertise in LLMs, arXiv:2408.15915, alg. 2"

    block: int = 512

    def __init__(self, options: KShotOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        shots = needs_shots("kshot", shots)
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        cosines = similarities(embeddings, features.shot_embeddings())
        scores, order = self._rank(embeddings, features.shot_embeddings(), cosines)
        walk = RepeatWalk(embeddings, self.options.tau, self.block)
        if not self.options.refill:
            order = np.array(meter.walk(order.tolist()), dtype=np.int64)
            meter = BudgetMeter(meter.limit, meter.costs)
        near = _within(order, self.options.reach, meter)
        walk.run(order[:near], meter)
        back = meter.walk(walk.repeats) if self.options.refill else []
        rest = meter.walk(order[near:].tolist()) if self.options.refill else []
        rows = np.array([*walk.kept, *back, *rest], dtype=np.int64)
        describe = describe_shot(shots)
        nearest = cosines.argmax(axis=1)
        reasons = [describe(int(nearest[row]), float(cosines[row, nearest[row]])) for row in rows]
        for position, row in enumerate(back, start=len(walk.kept)):
            reasons[position] += f"; like the row of rank {walk.repeats[row] + 1}, brought back"
        counts = {"passed over": len(walk.repeats), "brought back": len(back), "within": near}
        log = [*_shot_counts(nearest[rows], len(shots)), {"step": "repeats", **counts}]
        return Selection(rows, scores[rows], reasons, log, scores)

    def _rank(self, embeddings: Floats, anchors: Floats, cosines: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Scores [n], and all rows in the order they are offered."""
        if self.options.order == "mean":
            mean = anchors.mean(axis=0, keepdims=True)
            length = float(np.linalg.norm(mean))
            scores = similarities(embeddings, mean / length if length else mean)[:, 0]
        else:
            scores = cosines.max(axis=1)
        if self.options.order == "turns":
            return scores, np.fromiter(_turns(cosines), dtype=np.int64, count=len(cosines))
        return scores, np.argsort(-scores, kind="stable")


def _turns(cosines: Floats) -> Iterator[int]:
    """Every row once: the shots take turns, each taking its nearest row that is still there."""
    lists = np.argsort(-cosines, axis=0, kind="stable")
    taken = np.zeros(len(cosines), dtype=bool)
    heads = [0] * cosines.shape[1]
    while True:
        for shot, head in enumerate(heads):
            while head < len(lists) and taken[lists[head, shot]]:
                head += 1
            if head == len(lists):
                return
            row = int(lists[head, shot])
            taken[row] = True
            heads[shot] = head + 1
            yield row


def _within(order: NDArray[np.int64], reach: float, meter: BudgetMeter) -> int:
    """How many of the first rows of `order` hold `reach` times the budget, or all."""
    if meter.costs is None:
        return min(len(order), math.ceil(reach * meter.limit))
    spent = np.cumsum(meter.costs[order])
    return min(len(order), int(np.searchsorted(spent, reach * meter.limit)) + 1)


def _shot_counts(nearest: NDArray[np.int64], shots: int) -> list[dict[str, Any]]:
    """Of how many rows taken each shot is the nearest."""
    taken = np.bincount(nearest, minlength=shots)
    return [{"step": "shot", "shot": shot + 1, "nearest of": int(count)} for shot, count in enumerate(taken)]


PLUGIN = KShot
