"""What the cards of experts say, as one matrix: tasks x experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, unknown
from xpert.registry.card import BaseModel, ExpertCard, Interval, SkillScore
from xpert.registry.ranking.points import Scores

if TYPE_CHECKING:
    from xpert.registry.store import Details

__all__ = ["OVER", "Matrix", "Task", "profile_matrix"]

OVER = ("expert", "gain")
CHOICE = "choices by likelihood"
NOT_PROFILED = "not profiled"
Z95 = 1.959964
"""Half a 95 % interval in standard deviations."""


@dataclass(frozen=True, order=True)
class Task:
    """One skill of one suite by one metric: scores compare inside it only. `label` tells it from the others."""

    suite: str
    suite_fingerprint: str
    skill: str
    metric: str
    label: str = ""


@dataclass(frozen=True)
class Matrix:
    """Scores, 95 % limits and item counts [tasks, systems]; NaN (n: 0) where an expert lacks a task.

    `systems` are refs such as `acme/sums@2`, sorted; all are of `base`. `over` says whether scores are the experts'
    own or their gains over the base (then within [-1, 1]). `left_out`: ref -> why it has no row here. `warnings` say
    where suites, metrics or tasks do not meet.
    """

    base: BaseModel
    over: str
    tasks: tuple[Task, ...]
    systems: tuple[str, ...]
    scores: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: NDArray[np.int64]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]

    def by_task(self) -> Scores:
        """task's label -> system -> score, without those that are missing."""
        return {
            task.label: {s: float(v) for s, v in zip(self.systems, row, strict=True) if np.isfinite(v)}
            for task, row in zip(self.tasks, self.scores, strict=True)
        }

    @property
    def metrics(self) -> dict[str, str]:
        """task's label -> its metric."""
        return {task.label: task.metric for task in self.tasks}

    @property
    def sd(self) -> NDArray[np.float64]:
        """Standard deviations [tasks, systems] that the intervals amount to."""
        found: NDArray[np.float64] = (self.high - self.low) / (2 * Z95)
        return found


def profile_matrix(
    details: Sequence[Details], *, over: str = "expert", choice: bool = False, skills: Sequence[str] = ()
) -> Matrix:
    """The skill profiles of experts side by side.

    A task is a skill of one suite, told by the suite's fingerprint, so equal names of two suites are never mixed.
    `choice`: accuracies by likelihood over choices. A gain's interval takes expert and base as independent, which is
    wider than the truth where both err on the same items. `skills` keeps those alone.
    Raises BadInput for experts of different bases, for mixtures, and where nothing is left to compare; NotFound for a
    skill that no profile has.
    """
    cells: dict[str, dict[Task, Interval]] = {}
    left_out: dict[str, str] = {}
    seen: set[str] = set()
    cards = {one.version.ref: _card(one) for one in details}
    base = _one_base(cards)
    for ref, card in cards.items():
        if card.profile is None:
            left_out[ref] = NOT_PROFILED
            continue
        seen |= card.profile.skills.keys()
        found = {
            Task(card.profile.suite, card.profile.suite_fingerprint, skill, CHOICE if choice else score.metric): cell
            for skill, score in card.profile.skills.items()
            if (not skills or skill in skills) and (cell := _cell(score, over, choice)) is not None
        }
        if found:
            cells[ref] = found
        else:
            none = not skills or any(skill in skills for skill in card.profile.skills)
            left_out[ref] = "no item of its profile has choices" if none else "has none of these skills"
    for skill in skills:
        if skill not in seen and seen:
            raise unknown("skill", skill, seen)
    if not cells:
        profile = "`xpert profile` scores an expert; publish it again after that"
        raise BadInput(_nothing(left_out), hint=profile if NOT_PROFILED in left_out.values() else None)
    return _filled(base, over, cells, left_out)


def _filled(
    base: BaseModel, over: str, cells: Mapping[str, Mapping[Task, Interval]], left_out: Mapping[str, str]
) -> Matrix:
    systems = tuple(sorted(cells))
    # A suite's name may have changed between two profiles on it; the fingerprint is what counts.
    names = {task.suite_fingerprint: task.suite for found in cells.values() for task in found}
    keys = sorted({(task.skill, task.suite_fingerprint, task.metric) for found in cells.values() for task in found})
    place = {key: number for number, key in enumerate(keys)}
    shape = len(keys), len(systems)
    scores, low, high = (np.full(shape, np.nan) for _ in range(3))
    n = np.zeros(shape, dtype=np.int64)
    for column, system in enumerate(systems):
        for task, cell in cells[system].items():
            row = place[task.skill, task.suite_fingerprint, task.metric]
            scores[row, column], low[row, column], high[row, column] = cell.score, cell.low, cell.high
            n[row, column] = cell.n
    labels = _labels(keys, names)
    tasks = tuple(
        Task(names[suite], suite, skill, metric, label)
        for (skill, suite, metric), label in zip(keys, labels, strict=True)
    )
    warnings = (*_suites(names), *_overlap(systems, np.isfinite(scores), labels))
    return Matrix(base, over, tasks, systems, scores, low, high, n, left_out, warnings)


def _card(details: Details) -> ExpertCard:
    if details.version.kind != "expert":
        raise BadInput(f"{details.version.ref} is a {details.version.kind}; only experts have skill profiles")
    return ExpertCard.from_dict(details.document, where=details.version.ref)


def _one_base(cards: Mapping[str, ExpertCard]) -> BaseModel:
    bases = {card.base.fingerprint: (ref, card.base) for ref, card in cards.items()}
    if not bases:
        raise BadInput("there are no experts to compare")
    if len(bases) > 1:
        told = ", ".join(f"{ref} of {base.ref} ({base.fingerprint[:12]})" for ref, base in list(bases.values())[:4])
        raise BadInput(f"experts of {len(bases)} base models are not compared: {told}", hint="choose one by --base")
    ((_, base),) = bases.values()
    return base


def _cell(score: SkillScore, over: str, choice: bool) -> Interval | None:
    expert, base = (score.expert_choice, score.base_choice) if choice else (score.expert, score.base)
    if expert is None or over == "expert":
        return expert
    if base is None:
        return None
    gain = expert.score - base.score
    half = float(np.hypot(expert.high - expert.low, base.high - base.low)) / 2
    return Interval(gain, max(-1.0, gain - half), min(1.0, gain + half), min(expert.n, base.n))


def _nothing(left_out: Mapping[str, str]) -> str:
    reasons = Counter(left_out.values())
    return f"nothing to rank: {', '.join(f'{reason} ({count})' for reason, count in reasons.items())}"


def _labels(keys: Sequence[tuple[str, str, str]], names: Mapping[str, str]) -> list[str]:
    """The skill; with its suite where two have it, and with its metric where that is not enough."""
    by_skill = Counter(skill for skill, _, _ in keys)
    by_suite = Counter((skill, suite) for skill, suite, _ in keys)
    labels = []
    for skill, suite, metric in keys:
        told = [f"{names[suite]} {suite[:8]}"] if by_skill[skill] > by_suite[skill, suite] else []
        told += [metric] if by_suite[skill, suite] > 1 else []
        labels.append(f"{skill} ({', '.join(told)})" if told else skill)
    return labels


def _suites(names: Mapping[str, str]) -> list[str]:
    if len(names) < 2:
        return []
    told = ", ".join(f"{name} ({fingerprint[:8]})" for fingerprint, name in sorted(names.items(), key=lambda i: i[1]))
    return [f"profiles on {len(names)} suites, {told}: scores are compared inside each only"]


def _overlap(systems: Sequence[str], known: NDArray[np.bool_], labels: Sequence[str]) -> list[str]:
    if len(systems) == 1:
        return ["one expert alone has no rank"]
    warnings = []
    alone = [label for label, taken in zip(labels, known.sum(axis=1), strict=True) if taken == 1]
    if alone:
        told = ", ".join(alone[:4]) + (", ..." if len(alone) > 4 else "")
        warnings.append(f"{len(alone)} of {len(labels)} tasks have one expert only and say nothing of ranks: {told}")
    shared = known.astype(np.int64).T @ known.astype(np.int64)
    apart = np.argwhere(np.triu(shared == 0, 1))
    if len(apart):
        one, other = (systems[number] for number in apart[0])
        warnings.append(
            f"{len(apart)} of {len(systems) * (len(systems) - 1) // 2} pairs of experts share no task, such as "
            f"{one} and {other}: their order is by others, or by nothing"
        )
    return warnings
