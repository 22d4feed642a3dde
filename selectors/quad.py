"""Scores blocks of rows of the most promising clusters, whose neighbours learn from them (Quad)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Shots
from xpert.selectors._arms import Arms, Ints, neighbours
from xpert.selectors._bandits import POLICIES, BanditOptions, conclude, start
from xpert.selectors._ranked import best_first

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class QuadOptions(BanditOptions):
    """The settings of the released code are in brackets where they differ."""

    batch: int = option(5, "rows scored each time a cluster is pulled [10]", minimum=1)
    alpha: float = option(
        0.3, "how much ucb1, mean-std and thompson explore, in standard deviations of the rewards; 0: never", minimum=0
    )
    arms: int = option(4, "clusters pulled a round [50 of 9,873]", minimum=1)
    tau: str = option(
        "75%",
        "reward from which a cluster is worth choosing, and what an unknown one is taken to be worth: a quantile of "
        "all rewards so far (75%), their mean (mean), or a number [0.002]",
    )
    radius: float = option(
        0.2, "cosine distance of centroids within which clusters learn from each other; 0: never", minimum=0, maximum=2
    )
    claim: int = option(
        0,
        "rows of its cluster that a pull above tau claims; pulling ends once the claims fill the budget [20,000 of 10 "
        "million]; 0: only `evaluate` ends it",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        read_tau(self.tau)


class Quad:
    """A bandit over clusters that pulls several a round and lets near clusters learn from each other.

    Each round scores `batch` unseen rows of each of the `arms` clusters of greatest index; a pull's reward is their
    mean less tau. A cluster at centroid distance d < radius gets r (1 - d / radius), and counts one more pull. The
    index is R_j / T_j + alpha std sqrt(2 ln N / (T_j + 1)) under ucb1, with R_j / T_j = 0 where nothing is known. Ends
    when `evaluate` rows are scored, or claims fill the budget. Then, in this order: scored rows above tau by their
    score; rows not scored of clusters worth more than tau, by the cluster's worth, at random inside it; scored rows
    that are not above tau; the rows of all other clusters; rows that the scorer cannot score. Unlike the released code,
    which takes as many rows of each cluster as it claimed, this ranks rows; alpha and tau follow the scale of the
    rewards. Needs shots where the reward does, as `less` does.
    """

    Options: ClassVar[type[Config]] = QuadOptions
    needs: ClassVar[frozenset[str]] = frozenset({"clusters", "base"})
    cost: ClassVar[str] = "the reward of `evaluate` rows alone; time O(k) a pull and O(k^2 d) once, memory O(n + k^2)"
    source: ClassVar[str] = "Quad: Zhang et al. 2024, arXiv:2409.16986"

    def __init__(self, options: QuadOptions) -> None:
        self.options = options

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        options = self.options
        given = start(options, features, shots, budget, rng)
        tau, quantile = read_tau(options.tau)
        arms = Arms(
            given.labels,
            len(given.clusters),
            given.scorer.score,
            rng,
            given.limit,
            near=neighbours(given.clusters.centroids, options.radius),
            tau=tau,
            quantile=quantile,
            blocks=True,
        )
        claims = np.zeros(arms.many, np.int64)
        while not (arms.done or (options.claim and self._filled(arms, claims, given.meter))):
            index = POLICIES[options.policy](arms, options, options.arms)
            pulled = arms.best(index, options.arms)
            rewards = np.array(arms.pull(pulled, options.batch, index))
            level = arms.level
            claims[np.array(pulled)[rewards > level]] += options.claim
        return conclude(arms, given.scorer, given.meter, _order(arms))

    def _filled(self, arms: Arms, claims: Ints, meter: BudgetMeter) -> bool:
        """Whether the rows claimed would spend the budget, a row costing what rows cost on average."""
        claimed = int(np.minimum(claims, arms.sizes).sum())
        mean_cost = 1.0 if meter.costs is None else float(meter.costs.mean())
        return claimed * mean_cost >= meter.limit


def _order(arms: Arms) -> Ints:
    ranked = best_first(arms.scores)
    ranked = ranked[np.isfinite(arms.scores[ranked])]
    above = arms.scores[ranked].astype(np.float64) > arms.level
    unscored = arms.unscored()
    promising = arms.means()[arms.labels[unscored]] > 0
    unscorable = np.flatnonzero(arms.scored & ~np.isfinite(arms.scores))
    parts = [ranked[above], unscored[promising], ranked[~above], unscored[~promising], unscorable]
    return np.concatenate(parts).astype(np.int64)


def read_tau(text: str) -> tuple[float | None, float | None]:
    """(number, quantile) that `tau` means; neither for the running mean. Raises BadInput for anything else."""
    if text == "mean":
        return None, None
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (text.endswith("%") and not 0 <= value <= 100):
        raise BadInput(f"tau is {text!r}", hint="write mean, a quantile such as 75%, or a number")
    return (None, value / 100) if text.endswith("%") else (value, None)


PLUGIN = Quad
