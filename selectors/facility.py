"""Facility location: rows that stand for the whole pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._anchors import nearest_shots, needs_shots
from xpert.selectors._coverage import HELD, SIMILARITIES, Cover, Coverage, GraphCoverage, take_greedily

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

ROWS_PER_BLOCK = 400
EXACT_GRAPH = 10_000
"""Up to so many rows the neighbour graph is exact; above, an inverted-file index finds it."""


@dataclass(frozen=True)
class FacilityOptions(Config):
    mode: str = option(
        "blocks",
        "blocks: inside k-means blocks of about 400 rows; exact: over the whole pool; sparse: over a neighbour graph; "
        "shots: cover the shots instead of the pool (needs --shots)",
        choices=("blocks", "exact", "sparse", "shots"),
    )
    similarity: str = option(
        "clip", "clip: max(cos, 0); shifted: (1 + cos) / 2, which favours central rows", choices=tuple(SIMILARITIES)
    )
    neighbours: int = option(128, "mode sparse: neighbours of each row in the graph", minimum=1)
    eta: float = option(1.0, "mode shots: weight of each row's own likeness to a shot", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default, mode in (("neighbours", 128, "sparse"), ("eta", 1.0, "shots")):
            if getattr(self, name) != default and self.mode != mode:
                raise BadInput(f"{name} has no part in mode {self.mode}", hint=f"leave it out, or take mode={mode}")


class Facility:
    """Rows such that every row of the pool is like one of them: greedy maximisation of facility location.

    f(S) = sum over rows v of max over s in S of sim(v, s); embeddings [n, d], unit rows -> rows in the order taken.
    Score: the gain in f. Greedy gives at least 1 - 1/e of the best f. Modes: `exact` is that greedy (lazy, the same
    sequence as the plain one); `blocks` counts similarities inside k-means blocks alone, and is exact for that f (a
    pool of at most 400 rows is one block); `sparse` counts those of a k-nearest-neighbour graph. Mode `shots` covers
    the shots: f(S) = sum over shots q of max over s of sim(q, s) + eta * sum over s of max over q of sim(q, s); in
    the other modes shots do not matter, but that rows overlapping them are left out.
    """

    Options: ClassVar[type[Config]] = FacilityOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = (
        "blocks: k-means and time O(400 n d), memory O(n (d + 400)); exact: time O(n^2 d) and more, memory 256 MB + "
        "O(n) (minutes from 50,000 rows); sparse: an IVF graph, memory O(n k); shots: time O(n K d)"
    )
    source: ClassVar[str] = (
        "Nemhauser, Wolsey, Fisher 1978, doi:10.1007/BF01588971; lazy: Minoux 1978; query form: submodlib's FLQMI"
    )

    block: int = HELD

    def __init__(self, options: FacilityOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        if self.options.mode == "shots":
            needs_shots("facility mode=shots", shots)
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        covers, members, log = self._covers(features, rng)
        rows, gains, blocks = take_greedily(covers, members, meter)
        of_block = [f" of block {block}" if len(covers) > 1 else "" for block in blocks]
        reasons = [f"adds {gain:.4g} to the coverage{place}" for gain, place in zip(gains, of_block, strict=True)]
        value, targets = sum(gains), sum(len(part) for part in members)
        if self.options.mode != "shots":
            log.append({"step": "coverage", "rows": len(rows), "value": round(value, 4), "most": targets})
        return Selection(np.array(rows, dtype=np.int64), np.array(gains, dtype=np.float32), reasons, log)

    def _covers(self, features: Features, rng: np.random.Generator) -> tuple[list[Cover], list[Ints], list[Any]]:
        """The blocks to choose from, their pool rows (ascending), and what the log says of them."""
        embeddings = features.embeddings()
        similarity = SIMILARITIES[self.options.similarity]
        everything = [np.arange(len(embeddings), dtype=np.int64)]
        match self.options.mode:
            case "shots":
                likeness = similarity(nearest_shots(features)[0]).astype(np.float64)
                bonus = self.options.eta * likeness
                cover = Coverage(embeddings, features.shot_embeddings(), similarity, bonus=bonus, held=self.block)
                return [cover], everything, []
            case "sparse":
                neighbours, cosines, how = _graph(embeddings, self.options.neighbours)
                log = [{"step": "graph", "neighbours": neighbours.shape[1], "found by": how}]
                return [GraphCoverage(neighbours, similarity(cosines))], everything, log
            case "blocks" if len(embeddings) > ROWS_PER_BLOCK:
                members = _blocks(embeddings, int(rng.integers(2**31)))
            case _:
                members = everything
        parts = (embeddings[rows] for rows in members) if len(members) > 1 else iter([embeddings])
        # One block over everything thrashes where few columns are held: it gets 256 MB, all of 8,192 rows.
        held = self.block if len(members) > 1 else max(self.block, 2**26 // len(embeddings))
        covers: list[Cover] = [Coverage(part, part, similarity, held=held) for part in parts]
        sizes = [len(rows) for rows in members]
        return covers, members, [{"step": "blocks", "count": len(sizes), "least": min(sizes), "most": max(sizes)}]


def _blocks(embeddings: Floats, seed: int) -> list[Ints]:
    from xpert.clustering import cluster, cluster_count, different_rows

    # As many as `clusters` accepts: a pool of few different rows gets fewer.
    wanted = different_rows(embeddings, max(1, round(len(embeddings) / ROWS_PER_BLOCK)))
    labels, _ = cluster(embeddings, cluster_count(str(wanted), embeddings), seed=seed)
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return [part.astype(np.int64) for part in parts]


def _graph(embeddings: Floats, k: int) -> tuple[Ints, Floats, str]:
    """Each row's k nearest other rows [n, k], their cosines, and how they were found."""
    from xpert.similarity import nearest

    if len(embeddings) <= EXACT_GRAPH:
        cosines, neighbours = nearest(embeddings, embeddings, k, skip_self=True)
        return neighbours, cosines, "exact search"
    import faiss

    lists = round(4 * len(embeddings) ** 0.5)
    quantizer = faiss.IndexFlatIP(embeddings.shape[1])
    index = faiss.IndexIVFFlat(quantizer, embeddings.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.nprobe = 16
    rows = np.ascontiguousarray(embeddings)
    index.train(rows)
    index.add(rows)
    cosines, neighbours = index.search(rows, k + 1)
    return neighbours, np.asarray(cosines, dtype=np.float32), f"inverted file, {lists} lists, 16 probed"


PLUGIN = Facility
