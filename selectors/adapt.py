"""Each cluster is sampled over the whole range of the score that tells its rows apart best (Adapt)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter, allocate
from xpert.clustering import cluster, cluster_count
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.gradients import GradientOptions, GradientPass, gradient_dtype
from xpert.lora_training import LoraOptions
from xpert.protocols import Floats, Scorer, Selection
from xpert.records import Budget, Shots
from xpert.selectors._drawing import spend
from xpert.selectors._scaling import standardised
from xpert.selectors._scoring import check_scorer, prepared_scorer
from xpert.selectors._training import adapters

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "covering_bins", "nearest_earlier", "spread_entropy"]

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

_REACH = 4.0
"""Standardised scores are counted in bins from -4 to 4."""


@dataclass(frozen=True)
class AdaptOptions(Config):
    scorers: tuple[str, ...] = option(
        ("perplexity", "el2n", "entropy", "grand", "ifd"), "scorers of which each cluster gets the one that suits it"
    )
    cluster_by: str = option(
        "gradients",
        "what rows are clustered by: gradients of a new adapter of the base, or their embeddings; --clusters says into "
        "how many",
        choices=("gradients", "embeddings"),
    )
    sketch_dim: int = option(1024, "numbers kept of a gradient", minimum=2)
    bins: int = option(50, "bins of a histogram, and of the range of scores that is covered", minimum=1)
    cut: float = option(0.05, "share of a cluster's rows left out at either end of its scores", minimum=0, maximum=0.49)
    keep: str = option(
        "100%",
        "what the pool is pruned to first, by dropping rows that repeat others of their cluster: rows or a share",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorers or len(set(self.scorers)) != len(self.scorers):
            raise BadInput("scorers names none, or one twice", hint="write scorers=perplexity,el2n")
        for name in self.scorers:
            check_scorer(name)
        if Budget.parse(self.keep).in_tokens:
            raise BadInput(f"keep is {self.keep!r}, but rows are pruned", hint="write rows (2000) or a share (80%)")


class Adapt:
    """Equal parts of the budget for all clusters, each sampled evenly over the range of its own best score.

    Rows are clustered by the gradients of an untrained adapter (a sketch of its B half; A's gradient is 0 there). For
    each cluster every scorer's scores are standardised and counted in `bins` bins from -4 to 4; the scorer whose counts
    have the largest entropy is the cluster's. Then coverage-centric sampling: the `cut` at both ends is left out, the
    rest falls into bins of equal width, and every bin gives the same number of rows, at random, those that lack rows
    leaving it to the others. So do small clusters. With `keep`, rows are pruned for good before: every cluster keeps an
    equal part, its rows that are least like any earlier one (nearer gradients or embeddings are likelier to go); the
    log lists them. To spend the budget, rows follow in this order where the cores are used up: those cut off, those
    that no score could be given, those pruned. Score: the standardised score within the cluster.
    Unlike the released code budgets are exact, and the bins reach to 4 standard deviations whatever these are.
    """

    Options: ClassVar[type[Config]] = AdaptOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    cost: ClassVar[str] = (
        "every scorer on every row, a gradient a row with cluster-by=gradients; pruning O(sum of squares of the "
        "clusters' sizes)"
    )
    source: ClassVar[str] = "Adapt-inf, arXiv:2410.10636; sampling: CCS, arXiv:2210.15809"

    def __init__(self, options: AdaptOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        options = self.options
        rows = len(features.pool)
        meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
        kept_rows = Budget.parse(options.keep).limit(rows)
        vectors, labels = self._clusters(features)
        scorers = [prepared_scorer(name, "", features, shots, rng) for name in options.scorers]
        every = np.arange(rows, dtype=np.int64)
        table = np.stack([np.asarray(scorer.score(every), np.float64) for scorer in scorers])
        kept = _pruned(vectors, labels, kept_rows)
        best, entropies, scores = self._by_cluster(table, labels, kept)
        cells, cores = self._cells(scores, labels, kept)
        quotas = _quotas(cells, labels, meter, cores, options.bins)
        order = rng.permutation(rows).astype(np.int64)
        found, places = spend(order[cores[order]], cells, quotas, meter)
        scored = np.isfinite(scores)
        for late in (kept & scored & ~cores, kept & ~scored, ~kept):
            more = meter.walk(order[late[order]].tolist())
            places += [len(found) + 1.0 + place for place in range(len(more))]
            found += more
        chosen = np.array(found, np.int64)[np.lexsort((found, places))]
        reasons = [self._reason(int(row), scorers, labels, best, scores, kept, cores) for row in chosen]
        log = self._log(features, labels, best, entropies, kept, cores, chosen)
        least = float(scores[scored].min()) if scored.any() else 0.0
        return Selection(chosen, np.where(scored, scores, least)[chosen].astype(np.float32), reasons, log)

    def _clusters(self, features: Features) -> tuple[Floats, Ints]:
        """What rows are clustered by, unit vectors [n, d], and their clusters [n]."""
        if self.options.cluster_by == "embeddings":
            return features.embeddings(), np.asarray(features.clusters().labels, np.int64)
        dtype = gradient_dtype("auto", features.device)
        settings = GradientOptions(self.options.sketch_dim, "fold", features.options.max_length, dtype)
        with adapters(features, (), LoraOptions()) as checkpoints:
            row_pass = GradientPass(features.base(), tuple(checkpoints), settings)
            found = features.compute(row_pass, np.arange(len(features.pool), dtype=np.int64))["gradient"]
        # Rows without a gradient are alike: they have nothing that tells them apart.
        vectors = np.nan_to_num(np.asarray(found[:, 0], np.float32))
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        count = cluster_count(features.options.clusters, vectors)
        return vectors, np.asarray(cluster(vectors, count, seed=features.seed)[0], np.int64)

    def _by_cluster(self, table: Reals, labels: Ints, kept: NDArray[np.bool_]) -> tuple[Ints, Reals, Reals]:
        """(each cluster's scorer [k], entropies [k, scorers], the rows' standardised scores by their scorers [n])."""
        many = int(labels.max()) + 1
        best, entropies = np.zeros(many, np.int64), np.zeros((many, len(table)))
        scores = np.full(len(labels), np.nan)
        for number in range(many):
            rows = np.flatnonzero((labels == number) & kept)
            if not len(rows):
                continue
            standard = np.stack([standardised(line[rows]) for line in table])
            entropies[number] = [spread_entropy(line, self.options.bins) for line in standard]
            best[number] = int(entropies[number].argmax())
            scores[rows] = standard[best[number]]
        return best, entropies, scores

    def _cells(self, scores: Reals, labels: Ints, kept: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_]]:
        """(cluster * bins + bin of each row [n], whether it is in its cluster's core [n])."""
        cells, cores = labels * self.options.bins, np.zeros(len(labels), bool)
        for number in np.unique(labels):
            rows = np.flatnonzero((labels == number) & kept & np.isfinite(scores))
            core, bins = covering_bins(scores[rows], self.options.cut, self.options.bins)
            cores[rows[core]] = True
            cells[rows[core]] += bins
        return cells, cores

    def _reason(
        self,
        row: int,
        scorers: Sequence[Scorer],
        labels: Ints,
        best: Ints,
        scores: Reals,
        kept: NDArray[np.bool_],
        cores: NDArray[np.bool_],
    ) -> str:
        number = labels[row]
        where = f"cluster {number} by {self.options.scorers[best[number]]}"
        if not kept[row]:
            return f"brought back from those pruned; cluster {number}"
        told = scorers[best[number]].explain(row)
        if not np.isfinite(scores[row]):
            return f"not scored: {told}; {where}"
        return f"{told}; {where}" + ("" if cores[row] else ", beyond its cut")

    def _log(
        self,
        features: Features,
        labels: Ints,
        best: Ints,
        entropies: Reals,
        kept: NDArray[np.bool_],
        cores: NDArray[np.bool_],
        chosen: Ints,
    ) -> list[dict[str, Any]]:
        names, many = self.options.scorers, len(best)
        counts = {
            "rows": np.bincount(labels, minlength=many),
            "kept": np.bincount(labels[kept], minlength=many),
            "core": np.bincount(labels[cores], minlength=many),
            "taken rows": np.bincount(labels[chosen], minlength=many),
        }
        log: list[dict[str, Any]] = [
            {
                "step": "cluster",
                "cluster": number,
                "scorer": names[best[number]],
                "entropies": {
                    name: round(float(value), 4) for name, value in zip(names, entropies[number], strict=True)
                },
                **{name: int(values[number]) for name, values in counts.items()},
            }
            for number in np.unique(labels).tolist()
        ]
        gone = np.flatnonzero(~kept)
        ids = features.pool.take(gone)["id"].to_pylist() if len(gone) else []
        return [*log, {"step": "pruned", "kept": int(kept.sum()), "dropped": len(gone), "ids": ids}]


def spread_entropy(standard: Reals, bins: int) -> float:
    """Entropy in bits of standardised scores [m] counted in bins from -4 to 4, those beyond at its ends."""
    known = standard[np.isfinite(standard)]
    if not len(known):
        return 0.0
    counts, _ = np.histogram(np.clip(known, -_REACH, _REACH), bins=bins, range=(-_REACH, _REACH))
    shares = counts[counts > 0] / len(known)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def covering_bins(scores: Reals, cut: float, bins: int) -> tuple[Ints, Ints]:
    """(the core: indices of scores [m] without the `cut` at both ends, bin of each from 0): equal widths over the core.

    Source: coverage-centric coreset selection, Zheng et al. 2023, arXiv:2210.15809.
    """
    gone = int(cut * len(scores))
    core = np.argsort(scores, kind="stable")[gone : len(scores) - gone]
    if not len(core):
        return core, core
    low, high = scores[core[0]], scores[core[-1]]
    if high <= low:
        return core, np.zeros(len(core), np.int64)
    return core, np.minimum((scores[core] - low) / (high - low) * bins, bins - 1).astype(np.int64)


def nearest_earlier(vectors: Floats, rows: Ints, *, block: int = 1024) -> Floats:
    """The greatest cosine of each of `rows` [m] with one that stands before it; -2 for the first.

    Time O(m^2 d), memory O(block m).
    """
    found = np.full(len(rows), -2.0, np.float32)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        cosines = np.round(vectors[part] @ vectors[rows[: start + len(part)]].T, 6)
        cosines[np.arange(cosines.shape[1]) >= start + np.arange(len(part))[:, None]] = -2.0
        found[start : start + len(part)] = cosines.max(axis=1)
    return found


def _pruned(vectors: Floats, labels: Ints, keep: int) -> NDArray[np.bool_]:
    """Which rows [n] stay when the pool is pruned to `keep`, every cluster keeping an equal part as far as it can."""
    kept = np.ones(len(labels), bool)
    if keep >= len(labels):
        return kept
    sizes = np.bincount(labels)
    for number, share in enumerate(allocate((sizes > 0).astype(float), sizes, keep)):
        rows = np.flatnonzero(labels == number)
        if share < len(rows):
            kept[rows[np.argsort(nearest_earlier(vectors, rows), kind="stable")[share:]]] = False
    return kept


def _quotas(cells: Ints, labels: Ints, meter: BudgetMeter, cores: NDArray[np.bool_], bins: int) -> Ints:
    """What each cell [k * bins] may spend: clusters share alike, and so do the bins of each."""
    many = int(labels.max()) + 1
    costs = np.ones(len(labels), np.int64) if meter.costs is None else meter.costs
    caps = np.bincount(cells[cores], weights=costs[cores], minlength=many * bins).astype(np.int64).reshape(many, bins)
    shares = allocate((caps.sum(axis=1) > 0).astype(float), caps.sum(axis=1), meter.limit)
    parts = [allocate((cap > 0).astype(float), cap, int(share)) for cap, share in zip(caps, shares, strict=True)]
    return np.concatenate(parts).astype(np.int64)


PLUGIN = Adapt
