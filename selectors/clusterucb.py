"""Scores rows cluster by cluster where they promise most, and takes the best of all it scored (ClusterUCB)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xpert.budgeting import allocate
from xpert.config import Config, option
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._arms import Arms
from xpert.selectors._bandits import POLICIES, BanditOptions, conclude, policy_option, start
from xpert.selectors._ranked import best_first

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class ClusterUCBOptions(BanditOptions):
    policy: str = policy_option("mean-std")
    cold_start: float = option(
        0.01, "share of each cluster that is scored first, at least one row", minimum=0, maximum=1
    )


class ClusterUCB:
    """A bandit over clusters that ends with the best of all rows scored.

    First a share of every cluster is scored, at random; then, until `evaluate` rows are scored, these among them, the
    cluster of greatest index is pulled and `batch` more of its rows are scored. Where `evaluate` is less than one row
    a cluster, clusters drawn at random get one. Score: the row's own. Where the budget asks for more rows than were
    scored, rows follow that were not, those of the cluster of greatest mean reward first, at random inside it; rows
    that the scorer cannot score come last. Needs shots where the reward does, as `less` does. Unlike the published
    method it clusters embeddings: clusters of gradients would need the gradients of all rows, which the bandit is there
    to save.
    """

    Options: ClassVar[type[Config]] = ClusterUCBOptions
    needs: ClassVar[frozenset[str]] = frozenset({"clusters", "base"})
    cost: ClassVar[str] = "the reward of `evaluate` rows alone; time O(k) a pull besides, memory O(n)"
    source: ClassVar[str] = "ClusterUCB, arXiv:2506.10288"

    def __init__(self, options: ClusterUCBOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        options = self.options
        given = start(options, features, shots, budget, rng)
        arms = Arms(given.labels, len(given.clusters), given.scorer.score, rng, given.limit)
        arms.pull(range(arms.many), self._cold_start(arms, rng))
        while not arms.done:
            index = POLICIES[options.policy](arms, options, 1)
            arms.pull(arms.best(index, 1), options.batch, index)
        ranked = best_first(arms.scores)
        known = np.isfinite(arms.scores)
        unscorable = arms.scored & ~known
        order = np.concatenate([ranked[known[ranked]], arms.unscored(), np.flatnonzero(unscorable)])
        return conclude(arms, given.scorer, given.meter, order)

    def _cold_start(self, arms: Arms, rng: np.random.Generator) -> list[int]:
        """Rows of each arm [k] that are scored first; what does not fit the limit is left out arm by arm, at random."""
        wanted = np.minimum(np.maximum(np.round(self.options.cold_start * arms.sizes), 1), arms.sizes).astype(np.int64)
        if wanted.sum() <= arms.limit:
            return [int(count) for count in wanted]
        if (arms.sizes > 0).sum() <= arms.limit:
            first = np.minimum(arms.sizes, 1)
            more = allocate((wanted - first).astype(np.float64), wanted - first, arms.limit - int(first.sum()))
            return [int(count) for count in first + more]
        served = set(rng.permutation(np.flatnonzero(arms.sizes))[: arms.limit].tolist())
        return [int(arm in served) for arm in range(arms.many)]


PLUGIN = ClusterUCB
