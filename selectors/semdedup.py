"""SemDeDup: rows that repeat no other row of their cluster, by their embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.protocols import Floats, Selection
from xpert.records import Budget, Shots

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN", "Repeats", "keep_order", "repeats"]

Ints = NDArray[np.int64]

FARTHEST = 2.0
"""The greatest cosine distance there is: the score of a cluster's first row."""
BLOCK = 512


@dataclass(frozen=True)
class SemDeDupOptions(Config):
    eps: float = option(
        0.05, "a row repeats an earlier kept one of its cluster at a cosine of 1 - eps or more", minimum=0, maximum=2
    )
    keep: str = option(
        "hard",
        "which of the rows that repeat one another is kept: the farthest from the cluster's centre (hard), the "
        "nearest (easy), or any (random)",
        choices=("hard", "easy", "random"),
    )


@dataclass(frozen=True)
class Repeats:
    """Of each row the kept row that it repeats, [n] int64, -1 where it is kept; and the greatest cosine, [n] float32,
    with an earlier kept row of its cluster (-2 for a cluster's first row)."""

    of: Ints
    cosines: Floats


class SemDeDup:
    """Inside each cluster a row is dropped that is too like one kept before it; the survivors are taken first.

    embeddings [n, d], unit rows, in clusters -> rows. In each cluster the rows are walked in the order that `keep`
    says, and one with a cosine of at least 1 - eps to an earlier kept row is dropped. A selector has to spend its
    budget: survivors are taken in the order of `keep` over all clusters (hard: the farthest from its own centre first),
    and where they do not suffice the dropped rows follow, the one least like the row it repeats first. Score: 1 - the
    greatest cosine with an earlier kept row of the cluster; 2 for a cluster's first. Rows of different clusters are
    never compared. To drop repeats without a budget see `repeats`.
    """

    Options: ClassVar[type[Config]] = SemDeDupOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings", "clusters"})
    cost: ClassVar[str] = (
        "time O(sum over clusters of size * kept * d) after clustering, memory O(block * largest cluster)"
    )
    source: ClassVar[str] = "SemDeDup, arXiv:2303.09540"

    block: int = BLOCK

    def __init__(self, options: SemDeDupOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        embeddings, clusters = features.embeddings(), features.clusters()
        meter = BudgetMeter.of(budget, len(embeddings), features.lengths() if budget.in_tokens else None)
        labels = np.asarray(clusters.labels, dtype=np.int64)
        order = keep_order(embeddings, labels, clusters.centroids, self.options.keep, rng)
        found = repeats(embeddings, labels, order, self.options.eps, block=self.block)
        kept = found.of < 0
        survivors = meter.walk(order[kept[order]].tolist())
        dropped = np.flatnonzero(~kept)
        rest = meter.walk(dropped[np.argsort(found.cosines[dropped], kind="stable")].tolist())
        rows = np.array(survivors + rest, dtype=np.int64)
        scores = np.where(found.cosines < -1, FARTHEST, 1 - found.cosines)[rows].astype(np.float32)
        reasons = [
            f"cluster {labels[row]}, "
            + (
                f"cosine at most {found.cosines[row]:.3f} to a kept row"
                if found.cosines[row] >= -1
                else "its first row"
            )
            for row in survivors
        ]
        reasons += [f"brought back: cosine {found.cosines[row]:.3f} to a kept row of its cluster" for row in rest]
        counts = {"kept": int(kept.sum()), "dropped": len(dropped), "brought back": len(rest)}
        return Selection(rows, scores, reasons, [{"step": "repeats", **counts}])


def keep_order(embeddings: Floats, labels: Ints, centroids: Floats, keep: str, rng: np.random.Generator) -> Ints:
    """All rows [n], the one to be kept first first: `hard`, `easy` or `random`; ties to the lowest index."""
    if keep == "random":
        return rng.permutation(len(embeddings)).astype(np.int64)
    nearness = np.round(np.einsum("nd,nd->n", embeddings, centroids[labels]), 6)
    return np.argsort(nearness if keep == "hard" else -nearness, kind="stable").astype(np.int64)


def repeats(embeddings: Floats, labels: Ints, order: Ints, eps: float, *, block: int = BLOCK) -> Repeats:
    """Which rows repeat an earlier kept row of their cluster, by cosines of at least 1 - eps.

    embeddings [n, d] unit rows, labels [n], order [n]: a permutation of the rows, those to be kept first. What a
    filter needs is `of`: rows where it is -1 stay. Time O(size * kept * d) a cluster; memory O(block * size).
    """
    of = np.full(len(embeddings), -1, dtype=np.int64)
    cosines = np.full(len(embeddings), -FARTHEST, dtype=np.float32)
    for rows in _members(labels[order], order):
        kept: list[int] = []  # positions in `rows`
        vectors = embeddings[rows]
        for start in range(0, len(rows), block):
            part = vectors[start : start + block]
            known = np.round(part @ vectors[kept].T, 6) if kept else np.empty((len(part), 0), dtype=np.float32)
            within = np.round(part @ part.T, 6)
            best, which = _most(known, rows[kept])
            for place in range(len(part)):
                row = int(rows[start + place])
                cosines[row] = best[place]
                if best[place] >= 1 - eps:
                    of[row] = which[place]
                    continue
                kept.append(start + place)
                nearer = within[place] > best
                best[nearer], which[nearer] = within[place, nearer], row
    return Repeats(of, cosines)


def _members(labels: Ints, order: Ints) -> Iterator[Ints]:
    """The rows of each cluster, in the order given."""
    by_label = np.argsort(labels, kind="stable")
    for places in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        yield order[places]


def _most(cosines: Floats, rows: Ints) -> tuple[Floats, Ints]:
    """The greatest of each line, and the row it stands for; -2 and -1 where there is none."""
    if not len(rows):
        return np.full(len(cosines), -FARTHEST, dtype=np.float32), np.full(len(cosines), -1, dtype=np.int64)
    which = cosines.argmax(axis=1)
    return cosines[np.arange(len(cosines)), which], rows[which]


PLUGIN = SemDeDup
