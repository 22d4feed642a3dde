"""Selectors written down as steps, without code: `filter`, `score`, `allocate`, `pick`, in a YAML file.

    - filter: {duplicates: 0.95}
    - filter: {by: ifd, above-quantile: 0.2}
    - score: {name: worth, of: {ifd: 1, similarity: 2}}
    - allocate: {by: cluster, weights: size}
    - pick: {method: quad, share: 40%}
    - pick: {method: facility}

Steps run from top to bottom over the rows that are still candidates; a row that was picked is none any more. A pick
without a share takes what is left of the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter, allocate
from xpert.errors import BadInput
from xpert.protocols import Floats, Selection, Selector
from xpert.records import Budget, Shots
from xpert.selection import choose
from xpert.selectors._ranked import NOT_SCORED, best_first
from xpert.selectors._scaling import standardised
from xpert.selectors._scoring import prepared_scorer
from xpert.selectors._steps import AllocateStep, FilterStep, PickStep, ScoreStep, Step, parse_steps, read_steps

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["Pipeline", "read_pipeline"]

Ints = NDArray[np.int64]
Scale = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Pipeline:
    """A selector made of steps; `needs` are those of its parts."""

    cost = "that of its steps"
    source = "the steps' own"

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.needs = frozenset(need for step in self.steps for need in step.needs)

    def written(self) -> list[dict[str, Any]]:
        """The steps as plain JSON, every default included: what the manifest holds."""
        return [step.written() for step in self.steps]

    def select(self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator) -> Selection:
        lengths = features.lengths() if budget.in_tokens else None
        meter = BudgetMeter.of(budget, len(features.pool), lengths)
        run = _Run(features, shots, meter, rng)
        for step in self.steps:
            match step:
                case FilterStep():
                    run.filter(step)
                case ScoreStep():
                    run.score(step)
                case AllocateStep():
                    run.allocation = step
                case PickStep():
                    run.pick(step, last=step is self.steps[-1])
        return run.result()


@dataclass
class _Run:
    """A pipeline at work: what are still candidates, what was taken."""

    features: Features
    shots: Shots | None
    meter: BudgetMeter
    rng: np.random.Generator
    allocation: AllocateStep | None = None
    named: dict[str, Floats] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    log: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open = np.ones(len(self.features.pool), dtype=bool)

    @property
    def candidates(self) -> Ints:
        return np.flatnonzero(self.open)

    # ── filter and score ─────────────────────────────────────────────────────────────────────────────────────────

    def filter(self, step: FilterStep) -> None:
        before = self.candidates
        if step.duplicates is not None:
            from xpert.near_rows import first_of_near

            keep = first_of_near(self.features.embeddings()[before], step.duplicates)
        elif step.column is not None:
            keep = self._in_column(before, step.column, step.among)
        else:
            assert step.by is not None
            keep = _within(self._values(step.by, step.params, before), step)
        self.open[before[~keep]] = False
        self.log.append({"step": "filter", "what": step.words(), "before": len(before), "dropped": int((~keep).sum())})
        if not self.open.any():
            raise BadInput(f"the filter {step.words()} leaves no row", hint="loosen it")

    def _in_column(self, rows: Ints, column: str, among: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([str(value) in among for value in self._column(rows, column)], dtype=bool)

    def _column(self, rows: Ints, column: str) -> list[Any]:
        values = [row.columns.get(column) for row in self.features.pool.rows(rows.tolist())]
        if all(value is None for value in values):
            raise BadInput(f"no row has a column {column!r}", hint="name a column of the pool's rows")
        return values

    def score(self, step: ScoreStep) -> None:
        rows = self.candidates
        total = np.zeros(len(rows))
        for name, weight in step.of.items():
            values = self._values(name, step.params.get(name, {}), rows)
            scale: Scale = _SCALES[step.scale]
            total += weight * scale(values.astype(np.float64))
        kept = np.full(len(self.open), np.nan, np.float32)
        kept[rows] = total
        self.named[step.name] = kept
        self.log.append({"step": "score", "name": step.name, "rows": int(np.isfinite(total).sum())})

    def _values(self, name: str, params: Mapping[str, Any], rows: Ints) -> Floats:
        """A score step's values of these rows, or a scorer's."""
        if name in self.named:
            return self.named[name][rows]
        scorer = prepared_scorer(name, params, self.features, self.shots, self.rng)
        return scorer.score(rows)

    # ── allocate and pick ────────────────────────────────────────────────────────────────────────────────────────

    def pick(self, step: PickStep, *, last: bool) -> None:
        amount = self.meter.left if step.share is None else min(self.meter.left, round(step.share * self.meter.limit))
        self._must_hold(amount)
        before = len(self.rows)
        for group, part in self._groups(amount):
            self._take(step, group, part)
        # Whole rows rarely fill every group's tokens: what is left over is spent without regard to groups.
        spare = amount - (self._spent_since(before))
        if spare > 0 and (last or self.allocation is not None):
            self._take(step, self.candidates, min(spare, self._holds(self.candidates)))
        self.log.append({"step": "pick", "what": step.words(), "budget": amount, "rows": len(self.rows) - before})

    def _groups(self, amount: int) -> list[tuple[Ints, int]]:
        rows = self.candidates
        if self.allocation is None:
            return [(rows, amount)]
        step = self.allocation
        if step.by == "cluster":
            labels = np.asarray(self.features.clusters().labels, np.int64)[rows]
        else:
            values = self._column(rows, step.by.removeprefix("column "))
            labels = np.unique([str(value) for value in values], return_inverse=True)[1]
        members = [rows[labels == label] for label in np.unique(labels)]
        caps = np.array([self._holds(group) for group in members], dtype=np.int64)
        weights = np.array([1.0 if step.weights == "equal" else len(group) for group in members])
        return list(zip(members, allocate(weights, caps, amount).tolist(), strict=True))

    def _take(self, step: PickStep, group: Ints, amount: int) -> None:
        """At most `amount` of the group's rows, by the step's method."""
        cheapest = min((self.meter.cost(int(row)) for row in group), default=amount + 1)
        if amount < cheapest:
            return
        found = self._chosen(step, group, amount)
        for row, score, reason in zip(found.rows.tolist(), found.scores.tolist(), found.reasons, strict=True):
            if not self.meter.take(row):
                raise ValueError(f"{step.words()} took more than its share")
            self.rows.append(row)
            self.scores.append(score)
            self.reasons.append(f"{step.label}: {reason}")
        self.open[found.rows] = False
        self.log += [{"of": step.label, **entry} for entry in found.log]

    def _chosen(self, step: PickStep, group: Ints, amount: int) -> Selection:
        unit = "rows" if self.meter.costs is None else "tokens"
        if step.best is not None:
            scores = self._values(step.best, step.params, group)
            meter = BudgetMeter(amount, None if self.meter.costs is None else self.meter.costs[group])
            places = np.array(meter.walk(best_first(scores).tolist()), dtype=np.int64)
            known = np.isfinite(scores[places])
            reasons = [
                f"{value:.4g}" if ok else f"{NOT_SCORED}no value"
                for value, ok in zip(scores[places], known, strict=True)
            ]
            return Selection(group[places], np.where(known, scores[places], -1e9).astype(np.float32), reasons)
        away = np.setdiff1d(np.arange(len(self.open), dtype=np.int64), group)
        selector: Selector = step.open()
        seed = int(self.rng.integers(2**31))
        return choose(selector, self.features, self.shots, Budget(amount, unit), seed=seed, excluded=away)

    def _holds(self, rows: Ints) -> int:
        return len(rows) if self.meter.costs is None else int(self.meter.costs[rows].sum())

    def _spent_since(self, count: int) -> int:
        return self._holds(np.array(self.rows[count:], dtype=np.int64))

    def _must_hold(self, amount: int) -> None:
        held = self._holds(self.candidates)
        if held < amount:
            unit = "rows" if self.meter.costs is None else "tokens"
            raise BadInput(
                f"the pipeline's filters leave {held:,} {unit}, less than the {amount:,} to be picked",
                hint="loosen the filters, or lower --budget",
            )

    def result(self) -> Selection:
        if not self.rows:
            raise BadInput("no row fits the picks' shares of the budget", hint="raise --budget")
        return Selection(
            np.array(self.rows, dtype=np.int64), np.array(self.scores, dtype=np.float32), self.reasons, self.log
        )


def _within(values: Floats, step: FilterStep) -> NDArray[np.bool_]:
    """Which values lie within the step's bounds; what has no value never does."""
    known = np.isfinite(values)
    if not known.any():
        raise BadInput(f"the filter {step.words()} finds no row that can be scored")
    low, high = -np.inf, np.inf
    if step.above is not None:
        low = step.above
    if step.below is not None:
        high = step.below
    if step.above_quantile is not None:
        low = max(low, float(np.quantile(values[known], step.above_quantile)))
    if step.below_quantile is not None:
        high = min(high, float(np.quantile(values[known], step.below_quantile)))
    return np.asarray(known & (values >= low) & (values <= high))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    known = np.isfinite(values)
    found = np.full(len(values), np.nan)
    found[known] = rankdata(values[known]) / max(1, known.sum())
    return found


_SCALES: dict[str, Scale] = {"z": standardised, "rank": _ranks, "none": lambda values: values}


def read_pipeline(path: Path | str) -> Pipeline:
    """The pipeline of a YAML file. Raises BadInput naming the file, the step and the key for what it cannot be."""
    return Pipeline(read_steps(Path(path)))


def make_pipeline(steps: Sequence[Mapping[str, Any]]) -> Pipeline:
    """A pipeline from plain values, as the file would hold them."""
    return Pipeline(parse_steps(steps))
