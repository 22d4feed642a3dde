"""Experts in order, by every method that was asked for, with what is to be known beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.registry.ranking.bootstrap import DIGITS, DRAWS, Noise, Sureness, again, again_contests, sureness
from xpert.registry.ranking.consensus import kemeny
from xpert.registry.ranking.contests import Contests, contests_of
from xpert.registry.ranking.matrix import OVER, Matrix, profile_matrix
from xpert.registry.ranking.means import MEAN_OVER, mean_scores, tasks_to_mean
from xpert.registry.ranking.pairwise import PRIOR, bradley_terry
from xpert.registry.ranking.pareto import Front, Weighed, expert_costs, pareto, weigh
from xpert.registry.ranking.points import borda, ranks_of

if TYPE_CHECKING:
    from xpert.registry.store import Details

__all__ = [
    "METHODS",
    "Leaderboard",
    "RankOptions",
    "Ranking",
    "Standing",
    "leaderboard",
    "rank_contests",
    "rank_matrix",
]

METHODS = ("borda", "kemeny", "mean", "bradley-terry")
UNITS = {
    "borda": "share of the most points",
    "kemeny": "share of the others that stand behind",
    "mean": "mean score",
    "bradley-terry": "chance against an average expert",
}
"""What `share` is in each method: the score that costs are set against."""


@dataclass(frozen=True)
class RankOptions(Config):
    method: str = option("borda", "how tasks make one order", choices=(*METHODS, "all"))
    over: str = option("expert", "rank the experts' scores, or their gains over the base", choices=OVER)
    choice_scores: bool = option(False, "compare accuracies by likelihood over choices, where items have some")
    skills: tuple[str, ...] = option((), "only these skills")
    mean_over: str = option("common", "tasks of the mean: those all have, or each one's own", choices=MEAN_OVER)
    prior: float = option(PRIOR, "bradley-terry: drawn contests against an average one, for each", minimum=0)
    bootstrap: int = option(DRAWS, "draws of the tasks for intervals; 0 for none", minimum=0, maximum=1_000_000)
    draw_scores: bool = option(False, "in each draw, draw the scores from their own intervals too")
    pareto: tuple[str, ...] = option((), "who is beaten in none of these: score, rank, size, latency")
    weigh: tuple[str, ...] = option((), "score less weighed costs: size=0.1,latency=0.5")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, method in (("mean_over", "mean"), ("prior", "bradley-terry")):
            given = getattr(self, name)
            if given != type(self).__dataclass_fields__[name].default and self.method not in (method, "all"):
                flag = name.replace("_", "-")
                raise BadInput(f"{flag} {given} is of the method {method}, and means nothing to {self.method}")
        if self.draw_scores and not self.bootstrap:
            raise BadInput("draw-scores says what each draw does, and bootstrap is 0", hint="leave one of them out")


@dataclass(frozen=True)
class Standing:
    """One system's place. `share` is its standing in [0, 1] (a mean of gains: [-1, 1]); `error` a standard error; the
    rest is of the bootstrap, None without one or where no draw says anything of it."""

    system: str
    place: float
    points: float
    share: float
    error: float | None = None
    low: float | None = None
    high: float | None = None
    place_low: float | None = None
    place_high: float | None = None
    first: float | None = None


@dataclass(frozen=True)
class Ranking:
    """An order by one method, best first. `facts` are the method's own."""

    method: str
    standings: tuple[Standing, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "share": UNITS[self.method],
            "standings": [vars(standing) for standing in self.standings],
            **self.facts,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Leaderboard:
    matrix: Matrix
    rankings: tuple[Ranking, ...]
    costs: Mapping[str, Mapping[str, float]]
    front: Front | None
    weighed: Weighed | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; scores that are missing are left out."""
        matrix = self.matrix
        value: dict[str, Any] = {
            "base": {"ref": matrix.base.ref, "fingerprint": matrix.base.fingerprint},
            "over": matrix.over,
            "systems": list(matrix.systems),
            "tasks": [vars(task) for task in matrix.tasks],
            "scores": {task.label: _cells(matrix, row) for row, task in enumerate(matrix.tasks)},
            "rankings": {ranking.method: ranking.to_dict() for ranking in self.rankings},
            "costs": self.costs,
            "left_out": dict(matrix.left_out),
            "warnings": list(self.warnings),
        }
        if self.front:
            value["pareto"] = {
                "objectives": list(self.front.objectives),
                "front": list(self.front.front),
                "dominated": {system: list(by) for system, by in self.front.dominated.items()},
                "unknown": {system: list(missing) for system, missing in self.front.unknown.items()},
            }
        if self.weighed:
            value["weighed"] = {**vars(self.weighed), "choice": self.weighed.choice}
        return value


def leaderboard(
    details: Sequence[Details],
    options: RankOptions,
    *,
    weights: Mapping[str, float] | None = None,
    latencies: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Ranks experts by their profiles. The score of `pareto` and `weigh` is the share of the (first) method.

    Raises BadInput where the experts cannot be compared, and with a single method where that method cannot rank them;
    with `all`, a method that cannot is named among the warnings.
    """
    matrix = profile_matrix(details, over=options.over, choice=options.choice_scores, skills=options.skills)
    rankings, warnings = [], list(matrix.warnings)
    for method in METHODS if options.method == "all" else (options.method,):
        try:
            rankings.append(rank_matrix(matrix, method, options, seed=seed))
        except BadInput as error:
            if options.method != "all":
                raise
            warnings.append(f"no order by {method}: {error}")
    warnings += [warning for ranking in rankings for warning in ranking.warnings]
    costs = {ref: found for ref, found in expert_costs(details, latencies).items() if ref in matrix.systems}
    values = {s.system: {"score": s.share, **costs[s.system]} for s in rankings[0].standings}
    return Leaderboard(
        matrix,
        tuple(rankings),
        costs,
        pareto(values, options.pareto) if options.pareto else None,
        weigh(values, weights) if weights else None,
        tuple(warnings),
    )


def rank_matrix(matrix: Matrix, method: str, options: RankOptions, *, seed: int = 0) -> Ranking:
    """The order of a matrix's systems by one method, with bootstrap intervals if there are draws."""
    scores = matrix.by_task()
    facts: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()
    telling = drawn = sum(len(task) > 1 for task in scores.values())
    if method == "borda":
        points = borda(scores)
        most = max(1, telling * (len(points) - 1))
        shares = {system: value / most for system, value in points.items()}
    elif method == "kemeny":
        consensus = kemeny(scores, seed=seed)
        last = len(consensus.order)
        points = {system: float(last - place) for place, system in enumerate(consensus.order, 1)}
        shares = {system: value / max(1, last - 1) for system, value in points.items()}
        facts = {name: getattr(consensus, name) for name in ("disagreement", "bound", "certified", "components")}
    elif method == "mean":
        means = mean_scores(scores, over=options.mean_over, metrics=matrix.metrics)
        points = shares = dict(means.scores)
        drawn = int(tasks_to_mean(matrix.scores, options.mean_over).sum())
        facts, warnings = {"over": means.over, "tasks": dict(means.tasks)}, means.warnings
    else:
        found = bradley_terry(contests_of(scores), prior=options.prior)
        # An expert that shares no task with anybody met nobody; it has the prior's strength.
        points = dict.fromkeys(matrix.systems, 0.0) | dict(found.strengths)
        shares = {system: _chance(value) for system, value in points.items()}
        facts, warnings = {"contests": found.contests, "prior": options.prior}, found.warnings
    sure = None
    if options.bootstrap:
        if drawn < 2 and len(matrix.systems) > 1 and not options.draw_scores:
            warnings = (*warnings, "drawing one task anew says nothing: intervals have no width (see --draw-scores)")
        sure = _sure(matrix, method, options, seed)
    return Ranking(method, _standings(matrix.systems, points, shares, sure), facts, warnings)


def rank_contests(contests: Contests, options: RankOptions, *, seed: int = 0) -> Ranking:
    """The order out of a file of contests, by Bradley-Terry."""
    found = bradley_terry(contests, prior=options.prior)
    sure = None
    if options.bootstrap:
        sure = sureness(again_contests(contests, draws=options.bootstrap, seed=seed, prior=options.prior))
    shares = {system: _chance(value) for system, value in found.strengths.items()}
    standings = _standings(contests.systems, found.strengths, shares, sure, found.errors)
    facts = {"contests": found.contests, "prior": options.prior, "components": found.components}
    return Ranking("bradley-terry", standings, facts, found.warnings)


def _sure(matrix: Matrix, method: str, options: RankOptions, seed: int) -> Sureness:
    noise = Noise(matrix.sd, -1.0 if matrix.over == "gain" else 0.0, 1.0) if options.draw_scores else None
    points = again(
        matrix.scores,
        method,
        draws=options.bootstrap,
        seed=seed,
        noise=noise,
        mean_over=options.mean_over,
        prior=options.prior,
    )
    if method == "kemeny":  # minus the place -> how many stand behind, as its points are
        points = points + np.isfinite(points).sum(axis=1, keepdims=True)
    return sureness(points)


def _standings(
    systems: Sequence[str],
    points: Mapping[str, float],
    shares: Mapping[str, float],
    sure: Sureness | None,
    errors: Mapping[str, float] | None = None,
) -> tuple[Standing, ...]:
    ranked = list(points)
    rounded = np.round([points[system] for system in ranked], DIGITS)
    places = dict(zip(ranked, ranks_of(rounded).tolist(), strict=True))
    column = {system: number for number, system in enumerate(systems)}
    found = []
    for system in sorted(ranked, key=lambda system: (places[system], system)):
        spread: dict[str, float | None] = {}
        if sure is not None:
            for name in ("low", "high", "place_low", "place_high", "first"):
                spread[name] = _known(getattr(sure, name)[column[system]])
        error = None if errors is None else errors[system]
        found.append(Standing(system, places[system], points[system], shares[system], error, **spread))
    return tuple(found)


def _cells(matrix: Matrix, row: int) -> dict[str, dict[str, float]]:
    def cell(column: int) -> dict[str, float]:
        parts: dict[str, NDArray[Any]] = {"score": matrix.scores, "low": matrix.low, "high": matrix.high, "n": matrix.n}
        return {name: part[row, column].item() for name, part in parts.items()}

    return {s: cell(column) for column, s in enumerate(matrix.systems) if np.isfinite(matrix.scores[row, column])}


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _chance(strength: float) -> float:
    return 0.5 * (1.0 + math.tanh(strength / 2))
