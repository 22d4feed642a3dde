"""Bandits over clusters: which cluster to score rows of next, so that few rows need be scored.

To pull an arm is to score some of its cluster's rows. Exploration is in units of the running standard deviation of the
rewards, so that a bandit explores alike whatever a scorer's scale is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Scorer, Selection
from xpert.records import Budget, Shots
from xpert.selectors._arms import Arms, Reals
from xpert.selectors._scoring import check_scorer, prepared_scorer, scorer_settings

if TYPE_CHECKING:
    from xpert.clustering import Clusters
    from xpert.features import Features

__all__ = ["POLICIES", "BanditOptions", "conclude", "evaluations", "policy_option", "start"]

Ints = NDArray[np.int64]


NAMES = ("ucb1", "mean-std", "thompson", "epsilon-greedy", "thresh-hard", "thresh-normal", "uniform")


def policy_option(default: str) -> Any:
    return option(
        default,
        "which cluster is next. By its mean reward and: a bonus where few rows were scored (ucb1), the spread of its "
        "rewards (mean-std), a draw from what the mean may be (thompson), now and then a cluster at random "
        "(epsilon-greedy). By the share of its rewards that is among the best of all, as counted or as a normal "
        "distribution has it (thresh-hard, thresh-normal). Or any cluster at random (uniform)",
        choices=NAMES,
    )


@dataclass(frozen=True)
class BanditOptions(Config):
    """What all bandits share."""

    reward: str = option("less", "what a row is worth: the name of any scorer")
    reward_params: str = option("", "parameters of that scorer: KEY=VALUE,KEY=VALUE (a comma in a value is written ;)")
    evaluate: str = option("20%", "how many rows are ever scored: rows (2000), or a share of the pool (20%)")
    policy: str = policy_option("ucb1")
    alpha: float = option(
        1.0,
        "how much ucb1, mean-std (beta there) and thompson explore, in standard deviations of the rewards; 0: never",
        minimum=0,
    )
    epsilon: float = option(0.1, "chance of a random cluster under epsilon-greedy", minimum=0, maximum=1)
    top: float = option(0.25, "the share of all rewards that counts as best under thresh-*", minimum=0.001, maximum=1)
    batch: int = option(8, "rows scored each time a cluster is pulled", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self.reward, self.reward_params)
        if Budget.parse(self.evaluate).in_tokens:
            raise BadInput(
                f"evaluate is {self.evaluate!r}, but rows are scored, not tokens",
                hint="write rows (2000) or a share (20%)",
            )

    def to_dict(self) -> dict[str, Any]:
        """With the scorer's own settings, which may hold the content of a file."""
        return {**super().to_dict(), "reward_options": scorer_settings(self.reward, self.reward_params)}


# ── policies: (arms, options, how many are wanted) -> index [k] ───────────────────────────────────────────────

Policy = Callable[[Arms, BanditOptions, int], Reals]


def _ucb1(arms: Arms, options: BanditOptions, many: int) -> Reals:
    """R_j / T_j + alpha std sqrt(2 ln N / (T_j + 1)), N the sum of all T."""
    total = math.log(max(1.0, float(arms.count.sum())))
    return arms.means() + options.alpha * arms.spread * np.sqrt(2 * total / (arms.count + 1))


def _mean_std(arms: Arms, options: BanditOptions, many: int) -> Reals:
    return arms.means() + options.alpha * arms.spreads()


def _thompson(arms: Arms, options: BanditOptions, many: int) -> Reals:
    """A draw from each mean's posterior: rewards are normal about it with the common spread, as is it about tau."""
    known = arms.count / (arms.count + 1)
    noise = arms.rng.standard_normal(arms.many) * arms.spread / np.sqrt(arms.count + 1)
    return arms.means() * known + options.alpha * noise


def _epsilon_greedy(arms: Arms, options: BanditOptions, many: int) -> Reals:
    """The means, but each of the wanted places goes with chance epsilon to an open arm drawn at random."""
    index = arms.means()
    drawn = arms.rng.permutation(np.flatnonzero(arms.left > 0))
    lucky = drawn[: arms.rng.binomial(many, options.epsilon)]
    index[lucky] = np.inf
    return index


def _uniform(arms: Arms, options: BanditOptions, many: int) -> Reals:
    return arms.rng.random(arms.many)


POLICIES: Mapping[str, Policy] = {
    "ucb1": _ucb1,
    "mean-std": _mean_std,
    "thompson": _thompson,
    "epsilon-greedy": _epsilon_greedy,
    "thresh-hard": lambda arms, options, many: arms.beyond(options.top, normal=False),
    "thresh-normal": lambda arms, options, many: arms.beyond(options.top, normal=True),
    "uniform": _uniform,
}


# ── before the first pull ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Start:
    """What a bandit has before its first pull: the budget's meter, a ready scorer, the arms, and how many rows it may
    score."""

    meter: BudgetMeter
    scorer: Scorer
    clusters: Clusters
    labels: Ints
    limit: int


def start(
    options: BanditOptions, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator
) -> Start:
    """Raises BadInput where the budget or `evaluate` is more than there is, or the reward lacks what it needs."""
    rows = len(features.pool)
    meter = BudgetMeter.of(budget, rows, features.lengths() if budget.in_tokens else None)
    limit = evaluations(options, rows)
    clusters = features.clusters()
    scorer = prepared_scorer(options.reward, options.reward_params, features, shots, rng)
    return Start(meter, scorer, clusters, np.asarray(clusters.labels, np.int64), limit)


# ── from the rows scored to a selection ──────────────────────────────────────────────────────────────────────────────


def evaluations(options: BanditOptions, rows: int) -> int:
    """How many of a pool's rows may be scored. Raises BadInput where they are more than there are."""
    try:
        return Budget.parse(options.evaluate).limit(rows)
    except BadInput as error:
        error.where = "evaluate"
        raise


def conclude(arms: Arms, scorer: Scorer, meter: BudgetMeter, order: Sequence[int] | Ints) -> Selection:
    """The selection of a bandit that has pulled: what fits of `order`, all rows of the pool, best first.

    Scores: a row's own; where it was not scored the mean reward of its arm; where it cannot be scored the least of all.
    """
    chosen = np.array(meter.walk(np.asarray(order).tolist()), dtype=np.int64)
    values = arms.means() + arms.level
    known = np.isfinite(arms.scores)
    least = float(arms.scores[known].min()) if known.any() else 0.0
    scores = np.where(known, arms.scores, np.where(arms.scored, least, values[arms.labels]))[chosen]
    reasons = []
    for row in chosen.tolist():
        arm = int(arms.labels[row])
        if known[row]:
            reasons.append(f"{scorer.explain(row)}; cluster {arm}")
        elif arms.scored[row]:
            reasons.append(f"not scored: {scorer.explain(row)}; cluster {arm}")
        else:
            reasons.append(f"not scored; cluster {arm} is worth {values[arm]:.4g} by {int(arms.drawn[arm])} rows")
    end = arms.summary()
    end[-1]["chosen unscored"] = int((~arms.scored[chosen]).sum())
    told: Callable[[], Sequence[Mapping[str, Any]]] = getattr(scorer, "log", tuple)
    return Selection(chosen, scores.astype(np.float32), reasons, [*told(), *arms.log, *end], arms.scores)
