"""Facility location: rows that stand for the whole pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from xpert.selectors._cells import ROWS_PER_CELL, cell_graph, k_means_cells
from xpert.selectors._coverage import (
    HELD,
    SIMILARITIES,
    Cover,
    Coverage,
    GraphCoverage,
    SquareCoverage,
    take_greedily,
)

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

EXACT_GRAPH = 10_000
"""Up to so many rows the graph of mode sparse is exact; above, an inverted-file index finds it."""
EXACT = 4_096
"""Up to so many rows mode cells is exact: that costs no more."""
SQUARE = 2**29
"""Similarities that mode exact holds at most: 2 GB, all of 23,170 rows."""
LEAST_WIDTH, MOST_WIDTH = 64, 256
_HIGHEST_FLOOR = 0.5


@dataclass(frozen=True)
class FacilityOptions(Config):
    mode: str = option(
        "cells",
        "cells: over a graph of similar rows, found in as many k-means cells as the data need; exact: over the whole "
        "pool; blocks: inside k-means blocks of about 400 rows; sparse: over a graph of a given width; shots: cover "
        "the shots instead of the pool (needs --shots)",
        choices=("cells", "exact", "blocks", "sparse", "shots"),
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
    Score: the gain in f. Greedy gives at least 1 - 1/e of the best f. Mode `exact` is that greedy, the same sequence
    as the plain loop.

    Mode `cells` (default) counts only similarities that can matter: of each row to the 64 to 256 rows most like it,
    gains being what lies above the similarity that any row has with some taken one; up to 4,096 rows it is `exact`.
    How many k-means cells are searched for these rows is measured on the data and said in the log. It reached 0.997
    and more of the exact greedy's f at 500 of 10,000 rows, clustered, with a falling spectrum and isotropic (see
    benchmarks/results/facility.md). It is fast where one cell or few are enough; on isotropic data nearly all must
    be searched, and it is hardly faster than `exact`. It loses where the search ends at 20,000 rows (larger pools
    without structure; `kept` in the log is then below 0.96), and may where each taken row stands for more than 256.

    Mode `blocks` counts similarities inside k-means blocks alone and is exact for that f (a pool of at most 400 rows
    is one block): 0.994 of the exact f on clustered data and a falling spectrum, and 0.966, little more than a random
    draw, on isotropic data, in that table. Mode `sparse` counts those of a k-nearest-neighbour graph, others being 0.
    Mode `shots` covers the shots: f(S) = sum over shots q of max over s of sim(q, s) + eta * sum over s of max over q
    of sim(q, s); in the other modes shots do not matter, but that rows overlapping them are left out.
    """

    Options: ClassVar[type[Config]] = FacilityOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = (
        "cells: time O(p n d) for p rows searched (400 where the pool is clustered, up to 20,000), memory O(256 n); "
        "exact: time O(n^2 d), memory 4 n^2 bytes up to 2 GB, above 23,170 rows slower (minutes from 50,000); blocks: "
        "time O(400 n d), memory O(n (d + 400)); sparse: an IVF graph, memory O(n k); shots: time O(n K d)"
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
        covers, members, log = self._covers(features, meter, rng)
        rows, gains, blocks = take_greedily(covers, members, meter)
        of_block = [f" of block {block}" if len(covers) > 1 else "" for block in blocks]
        reasons = [f"adds {gain:.4g} to the coverage{place}" for gain, place in zip(gains, of_block, strict=True)]
        if self.options.mode != "shots":
            targets = sum(len(part) for part in members)
            log.append({"step": "coverage", "rows": len(rows), "value": round(sum(gains), 4), "most": targets})
        return Selection(np.array(rows, dtype=np.int64), np.array(gains, dtype=np.float32), reasons, log)

    def _covers(
        self, features: Features, meter: BudgetMeter, rng: np.random.Generator
    ) -> tuple[Sequence[Cover], list[Ints], list[Any]]:
        """The blocks to choose from, their pool rows (ascending), and what the log says of them."""
        embeddings = features.embeddings()
        similarity = SIMILARITIES[self.options.similarity]
        everything = [np.arange(len(embeddings), dtype=np.int64)]
        match self.options.mode:
            case "shots":
                likeness = similarity(nearest_shots(features)[0]).astype(np.float64)
                bonus = self.options.eta * likeness
                covering = Coverage(embeddings, features.shot_embeddings(), similarity, bonus=bonus, held=self.block)
                return [covering], everything, []
            case "sparse":
                neighbours, cosines, how = _graph(embeddings, self.options.neighbours)
                log = [{"step": "graph", "neighbours": neighbours.shape[1], "found by": how}]
                return [GraphCoverage.of_neighbours(neighbours, similarity(cosines))], everything, log
            case "blocks" if len(embeddings) > ROWS_PER_CELL:
                members = k_means_cells(embeddings, int(rng.integers(2**31)))
                sizes = [len(rows) for rows in members]
                log = [{"step": "blocks", "count": len(sizes), "least": min(sizes), "most": max(sizes)}]
                return [_covering(embeddings[rows], similarity) for rows in members], members, log
            case "cells" if len(embeddings) > EXACT:
                cover, said = _over_cells(embeddings, similarity, meter, rng)
                return [cover], everything, [said]
        return [_covering(embeddings, similarity)], everything, [{"step": "exact", "rows": len(embeddings)}]


def _covering(embeddings: Floats, similarity: Callable[[Floats], Floats]) -> Cover:
    if len(embeddings) ** 2 <= SQUARE:
        return SquareCoverage(embeddings, similarity)
    return Coverage(embeddings, embeddings, similarity, held=max(HELD, SQUARE // len(embeddings)))


def _over_cells(
    embeddings: Floats, similarity: Callable[[Floats], Floats], meter: BudgetMeter, rng: np.random.Generator
) -> tuple[Cover, dict[str, Any]]:
    count = meter.limit if meter.costs is None else meter.limit / max(float(np.mean(meter.costs)), 1e-9)
    share = max(1, round(len(embeddings) / max(1.0, count)))  # the rows that a taken one stands for
    width = min(max(LEAST_WIDTH, 3 * share), MOST_WIDTH)
    graph = cell_graph(embeddings, share, width, rng)
    # Whatever is taken, a row is about as similar to something taken as to the last of its list. Not so where many
    # rows are alike, unless one of them is taken: so no more than is true of nearly all rows, and at most a half.
    floor = np.clip(graph.limits, 0, min(max(float(np.quantile(graph.limits, 0.1)), 0.0), _HIGHEST_FLOOR))
    said = {
        "step": "cells",
        "count": graph.cells,
        "searched": graph.searched,
        "kept": round(graph.kept, 4),
        "neighbours": round(len(graph.candidates) / len(embeddings), 1),
    }
    return GraphCoverage(graph.starts, graph.candidates, similarity(graph.cosines), similarity(floor)), said


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
