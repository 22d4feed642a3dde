"""IDEAL: rows from which the whole pool is reached along its neighbour graph."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.protocols import Floats, Selection
from xpert.records import Budget, Shots
from xpert.similarity import nearest

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "Cascades", "edge_chances"]

Ints = NDArray[np.int64]

_CELLS = 16_000_000
"""(start, node) pairs marked at once: 64 MB."""
_ROWS = 100_000
"""Rows of samples drawn at once; results do not depend on it."""


@dataclass(frozen=True)
class IdealOptions(Config):
    neighbours: int = option(10, "how many nearest neighbours each row may reach", minimum=1)
    p: float | None = option(
        None,
        "chance that a row reaches each of its neighbours; default: in proportion to their cosines, 1 in all",
        minimum=0,
        maximum=1,
    )
    samples: int = option(100, "how many random outcomes of all edges the influence is the mean over", minimum=1)


class Ideal:
    """Rows whose influence spreads over the pool: greedy maximisation of the independent cascade's reach.

    embeddings [n, d], unit rows. An edge leads from each row i to its k nearest others j, and carries with chance
    cos(i, j) / sum over j' of cos(i, j') (negative cosines count 0), each edge by itself -> rows in the order taken.
    f(S) = the mean number of rows reached from S, S included. Score: the gain in f, never rising.

    All edges are drawn once per sample and the same outcomes serve every set (common random numbers), so that f is
    exactly submodular, the lazy greedy is the plain greedy, and runs repeat. The released code simulates anew for
    each candidate (noise decides between them), counts a row twice that two rows reach in one step, and starts from
    the first row of the pool.
    """

    Options: ClassVar[type[Config]] = IdealOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = (
        "an exact neighbour graph: time O(n^2 d); then the reach of every row in every sample; memory O(samples n k)"
    )
    source: ClassVar[str] = "IDEAL, arXiv:2310.10873; live edges: Kempe et al. 2003; lazy: CELF, Leskovec et al. 2007"

    def __init__(self, options: IdealOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings = features.embeddings()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        cosines, neighbours = nearest(embeddings, embeddings, self.options.neighbours, skip_self=True)
        chances = edge_chances(cosines, self.options.p)
        cascades = Cascades(neighbours, chances, self.options.samples, rng)
        rows, gains = cascades.take(meter)
        reasons = [f"reaches {gain:.4g} rows that none before it reached" for gain in gains]
        log = [
            {"step": "graph", "neighbours": neighbours.shape[1], "mean reach of a row": round(cascades.mean_reach, 4)},
            {"step": "influence", "rows": len(rows), "reached": round(float(sum(gains)), 4), "of": len(embeddings)},
        ]
        return Selection(np.array(rows, dtype=np.int64), np.array(gains, dtype=np.float32), reasons, log)


def edge_chances(cosines: Floats, p: float | None = None) -> NDArray[np.float64]:
    """[n, k] chances: `p` for all, or each row's cosines, those below 0 counting 0, divided by their sum.

    A row whose cosines are all 0 reaches its neighbours with chances alike.
    """
    if p is not None:
        return np.full(cosines.shape, p)
    weights = np.maximum(np.asarray(cosines, np.float64), 0)
    weights[weights.sum(axis=1) == 0] = 1.0
    shares: NDArray[np.float64] = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return shares


class Cascades:
    """`samples` outcomes of all edges: neighbours [n, k] and their chances [n, k].

    Rows that reach one another in a sample are one node of it, so a sample is an acyclic graph of nodes. Memory
    O(samples * n) for the nodes and the edges that carry.
    """

    def __init__(self, neighbours: Ints, chances: NDArray[np.float64], samples: int, rng: np.random.Generator) -> None:
        self.samples = samples
        rows = len(neighbours)
        self._node = np.empty((rows, samples), dtype=np.int64)  # of each row in each sample
        sizes, starts, heads, reaches = [], [np.zeros(1, dtype=np.int64)], [], []
        nodes = edges = 0
        at_once = max(1, _ROWS // rows)
        for first in range(0, samples, at_once):
            part = min(at_once, samples - first)
            drawn = _condense(neighbours, rng.random((part, *chances.shape)) < chances)
            self._node[:, first : first + part] = drawn.node.T + nodes
            sizes.append(drawn.sizes)
            heads.append(drawn.heads + nodes)
            starts.append(drawn.starts[1:] + edges)
            reaches.append(_reach(drawn))
            nodes, edges = nodes + len(drawn.sizes), edges + len(drawn.heads)
        self._sizes, self._heads, self._starts = np.concatenate(sizes), np.concatenate(heads), np.concatenate(starts)
        self._reached = np.zeros(nodes, dtype=bool)
        self._seen = np.zeros(nodes, dtype=np.int64)  # in which search a node was met last
        self._search = 0
        self._first = np.concatenate(reaches)[self._node].sum(axis=1)
        self.mean_reach = float(self._first.mean()) / samples

    def take(self, meter: BudgetMeter) -> tuple[list[int], list[float]]:
        """The rows of the greatest gain, until the meter is full, and their gains; ties go to the lowest index."""
        heap = [(-int(gain), row, 0) for row, gain in enumerate(self._first)]
        heapq.heapify(heap)
        rows: list[int] = []
        gains: list[float] = []
        while heap and not meter.full:
            negative, row, when = heap[0]
            if when < len(rows):
                heapq.heapreplace(heap, (-int(self._sizes[self._new(row)].sum()), row, len(rows)))
                continue
            heapq.heappop(heap)
            if meter.take(row):
                self._reached[self._new(row)] = True
                rows.append(row)
                gains.append(-negative / self.samples)
        return rows, gains

    def _new(self, row: int) -> Ints:
        """The nodes, in all samples, that the row would reach and none has reached."""
        self._search += 1
        frontier = self._node[row]
        frontier = frontier[~self._reached[frontier]]
        found = [frontier]
        self._seen[frontier] = self._search
        while len(frontier):
            # What a reached node leads to is reached as well: the search need not pass it.
            heads = self._heads[_edges(self._starts, frontier)[0]]
            heads = heads[(self._seen[heads] != self._search) & ~self._reached[heads]]
            frontier = np.unique(heads)
            self._seen[frontier] = self._search
            found.append(frontier)
        return np.concatenate(found)


@dataclass(frozen=True)
class _Nodes:
    """Some samples: node [s, n] of each row; per node how many rows it has, where its edges begin, and its sample;
    the edges' heads; and where each sample's nodes begin, [s + 1]."""

    node: Ints
    sizes: Ints
    starts: Ints
    heads: Ints
    sample: Ints
    bases: Ints


def _condense(neighbours: Ints, carries: NDArray[np.bool_]) -> _Nodes:
    """The nodes of samples whose edges [s, n, k] carry or not, sample after sample."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    samples, rows, _ = carries.shape
    all_rows = samples * rows
    tails = np.repeat(np.arange(all_rows), carries.sum(axis=2).ravel())
    heads = (neighbours + rows * np.arange(samples)[:, None, None])[carries]
    graph = csr_array((np.ones(len(heads), dtype=np.int8), (tails, heads)), shape=(all_rows, all_rows))
    count, labels = connected_components(graph, directed=True, connection="strong")
    sample = np.empty(count, dtype=np.int64)
    sample[labels] = np.arange(all_rows) // rows
    order = np.argsort(sample, kind="stable")
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    labels, sample = place[labels], sample[order]
    between = labels[tails] != labels[heads]
    codes = np.unique(labels[tails[between]] * count + labels[heads[between]])
    return _Nodes(
        node=labels.reshape(samples, rows),
        sizes=np.bincount(labels, minlength=count).astype(np.int64),
        starts=np.concatenate([[0], np.cumsum(np.bincount(codes // count, minlength=count))]).astype(np.int64),
        heads=codes % count,
        sample=sample,
        bases=np.searchsorted(sample, np.arange(samples + 1)).astype(np.int64),
    )


def _edges(starts: Ints, nodes: Ints) -> tuple[Ints, Ints]:
    """The edges of these nodes, one node's after another's, and how many each has."""
    counts = starts[nodes + 1] - starts[nodes]
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[nodes] - ends + counts, counts), counts


def _reach(drawn: _Nodes) -> Ints:
    """How many rows are reached from each node, its own included: searches from many nodes at once."""
    reach = drawn.sizes.copy()
    sources = np.flatnonzero(np.diff(drawn.starts))
    width = int(np.diff(drawn.bases).max())
    step = max(1, _CELLS // width)
    mark = np.full(min(step, max(1, len(sources))) * width, -1, dtype=np.int32)
    for begin in range(0, len(sources), step):
        part = sources[begin : begin + step]
        base = drawn.bases[drawn.sample[part]]
        slots, tails = np.arange(len(part)), part
        while len(slots):
            edges, counts = _edges(drawn.starts, tails)
            slots, tails = np.repeat(slots, counts), drawn.heads[edges]
            cells = slots * width + tails - base[slots]
            new = np.flatnonzero(mark[cells] < 0)
            mark[cells[new]] = new
            new = new[mark[cells[new]] == new]  # a node that two edges lead to is met once
            slots, tails = slots[new], tails[new]
            reach[part] += np.bincount(slots, weights=drawn.sizes[tails], minlength=len(part)).astype(np.int64)
        mark.fill(-1)
    return reach


PLUGIN = Ideal
