"""Choosing a group of experts by the K shots of a task: who answers them right, to whom their answers are likely, and
who adds what the others do not.

Expert selection of "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models"
(arXiv:2408.15915): rank by accuracy plus rank by reasoning perplexity, and the rank of the group's diversity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.experts.recruiting.groups import Group, GroupSearch, check_exact, exact, greedy
from xpert.experts.recruiting.options import RecruitOptions
from xpert.experts.recruiting.shot_scores import Showing, score_shots, with_rationale
from xpert.progress import SILENT, Progress
from xpert.records import Shots
from xpert.registry.ranking import average_ranks

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["Recruit", "RecruitOptions", "Recruitment", "choose_group", "recruit"]

_BASE = ""
_DIGITS = 5
"""Significant digits of a perplexity that are ranked: what lies below is rounding of differently shaped batches."""


@dataclass(frozen=True)
class Recruit:
    """One expert's showing on the shots, and why it is in or out.

    Ranks are among all experts, 1 the best, ties averaged. `similarity`: mean cosine to the other members of the group
    (for one outside, to all members); None where it was no candidate or there is nobody else.
    """

    key: str
    accuracy: float
    perplexity: float
    accuracy_rank: float
    perplexity_rank: float
    chosen: bool
    reason: str
    similarity: float | None = None

    @property
    def rank(self) -> float:
        """R_A + R_P; lower is better."""
        return self.accuracy_rank + self.perplexity_rank

    def to_dict(self) -> dict[str, Any]:
        return {
            "expert": self.key,
            "accuracy": round(self.accuracy, 4),
            "perplexity": _finite(self.perplexity),
            "accuracy_rank": self.accuracy_rank,
            "perplexity_rank": self.perplexity_rank,
            "rank": self.rank,
            "similarity": None if self.similarity is None else round(self.similarity, 4),
            "chosen": self.chosen,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Recruitment:
    """Every expert, the group first and then the others, best ranks first; and what the group was chosen by."""

    experts: tuple[Recruit, ...]
    base: Showing
    group: Group
    candidates: int
    compared: int
    target: str
    options: RecruitOptions

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(one.key for one in self.experts if one.chosen)

    def lines(self) -> list[dict[str, Any]]:
        """What a mixture file keeps: a line per expert, with what it was measured against."""
        against = {
            "base_accuracy": round(self.base.accuracy, 4),
            "base_perplexity": _finite(self.base.perplexity),
            "perplexity_of": self.target,
        }
        return [{**one.to_dict(), **against} for one in self.experts]

    def summary(self) -> str:
        """One line: the size of the choice, and the figures of the group."""
        return (
            f"recruited {len(self.group.members)} of {self.candidates} candidates out of {len(self.experts)} experts: "
            f"{_figures(self.group)}, the best of {self.compared:,} groups ({self.options.search} search), mean cosine "
            f"{self.group.similarity:.3f} ({self.options.diversity}); perplexity is that of the {self.target}"
        )


def recruit(
    lm: LanguageModel,
    engine: Any,
    experts: Mapping[str, Path],
    shots: Shots,
    options: RecruitOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> Recruitment:
    """The group of experts for the task of the shots. `experts`: key -> adapter folder; the engine holds them all.

    Experts are ranked by accuracy and by perplexity (`score_shots`); of those better than the base in one of the two,
    the `candidates` with the least sum of ranks may be members. Of their groups the best by `choose_group` is taken.
    The answer does not depend on the order of `experts`. Raises BadInput where all are out, where an exact search is
    out of reach, and for `diversity="factors"` of unequal ranks. Cost: (experts + 1) · K greedy answers and as many
    scored texts, which is nearly all; then reading the candidates' adapters again.
    """
    options = options or RecruitOptions()
    if options.search == "exact":
        check_exact(options.pool_size(len(experts)), options.max_experts)
    sets = {_BASE: (), **{key: ((key, 1.0),) for key in experts}}
    shown = score_shots(lm, engine, sets, shots, progress=progress)
    base = shown.pop(_BASE)
    ranked = _ranked(shown)
    fit = [one for one in ranked if _gains(one, base)] if options.beat_base else ranked
    if not fit:
        raise BadInput(
            "no expert is better than the base model on these shots",
            hint="train an expert on these shots, keep such experts by --no-beat-base, or leave out --shots",
        )
    candidates = fit[: options.pool_size(len(fit))]
    alike = _likeness(lm, {one.key: experts[one.key] for one in candidates}, options, progress)
    search = choose_group([one.rank for one in candidates], alike, options)
    found = [_candidate(index, candidates, search, alike, base, options) for index in range(len(candidates))]
    found.sort(key=lambda one: not one.chosen)  # stable: best ranks first in both parts
    tried, able = {one.key for one in candidates}, {one.key for one in fit}
    found += [_left_out(one, base, len(candidates), is_able=one.key in able) for one in ranked if one.key not in tried]
    return Recruitment(tuple(found), base, search.group, len(candidates), search.compared, _target(shots), options)


def choose_group(ranks: Sequence[float], alike: NDArray[np.float64], options: RecruitOptions) -> GroupSearch:
    """The group of `options.max_experts` candidates. ranks [m]: R_P + R_A; alike [m, m]: their cosines."""
    search = exact if options.search == "exact" else greedy
    return search(np.array(ranks, dtype=np.float64), alike, options.max_experts)


def _ranked(shown: Mapping[str, Showing]) -> list[Recruit]:
    """Least sum of ranks first; then the lower perplexity, then the key, so that no order of input matters."""
    perplexities = {key: _rounded(one.perplexity) for key, one in shown.items()}
    by_accuracy = average_ranks({key: round(one.accuracy, _DIGITS) for key, one in shown.items()})
    by_perplexity = average_ranks({key: -value for key, value in perplexities.items()})
    found = [
        Recruit(key, one.accuracy, one.perplexity, by_accuracy[key], by_perplexity[key], False, "")
        for key, one in shown.items()
    ]
    return sorted(found, key=lambda one: (one.rank, perplexities[one.key], one.key))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _likeness(
    lm: LanguageModel, folders: Mapping[str, Path], options: RecruitOptions, progress: Progress
) -> NDArray[np.float64]:
    from xpert.experts.adapters import read_adapter
    from xpert.experts.recruiting.diversity import cosines

    with progress.task("recruiting: diversity", total=len(folders)) as task:
        adapters = []
        for key, folder in folders.items():
            adapters.append(read_adapter(key, folder, lm))
            task.advance(1, key)
        return cosines(adapters, options.diversity)


def _candidate(
    index: int,
    candidates: Sequence[Recruit],
    search: GroupSearch,
    alike: NDArray[np.float64],
    base: Showing,
    options: RecruitOptions,
) -> Recruit:
    """A candidate with its place in or outside the group, and why."""
    one = candidates[index]
    chosen = index in search.group.members
    others = [member for member in search.group.members if member != index]
    similarity = float(alike[index, others].mean()) if others else None
    reason = f"ranks {one.rank:g}: {_showing(one, base)}"
    if similarity is not None:
        reason += f"; mean cosine to {'the others' if chosen else 'the group'} {similarity:.3f}"
    if chosen:
        reason = f"{reason}; its group comes to {_figures(search.group)}"
        return replace(one, chosen=True, reason=reason, similarity=similarity)
    rival = search.rivals[index]
    named = " + ".join(candidates[member].key for member in rival.members)
    what = "group with it" if options.search == "exact" else "exchange for it"
    reason += f"; the best {what}, {named}, comes to {_figures(rival)} against {search.group.objective:g}"
    if rival.objective == search.group.objective and options.search == "exact":
        reason += "; of equal groups the one whose members rank first is taken"
    return replace(one, reason=reason, similarity=similarity)


def _left_out(one: Recruit, base: Showing, candidates: int, *, is_able: bool) -> Recruit:
    """An expert that was no candidate, and why."""
    if is_able:
        return replace(one, reason=f"{candidates} candidates rank before it ({one.rank:g}): {_showing(one, base)}")
    return replace(one, reason=f"no better than the base: {_showing(one, base)}")


def _figures(group: Group) -> str:
    return f"{group.objective:g} (ranks {group.rank_sum:g} + diversity {group.diversity_rank:g})"


def _gains(one: Recruit, base: Showing) -> bool:
    return one.accuracy > base.accuracy or one.perplexity < base.perplexity


def _showing(one: Recruit, base: Showing) -> str:
    return (
        f"accuracy {one.accuracy:.2f} against the base's {base.accuracy:.2f} (rank {one.accuracy_rank:g}), "
        f"perplexity {_number(one.perplexity)} against {_number(base.perplexity)} (rank {one.perplexity_rank:g})"
    )


def _target(shots: Shots) -> str:
    reasoned = with_rationale(shots)
    return f"answer and rationale ({reasoned} of {len(shots)} shots have one)" if reasoned else "answer"


def _finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return round(value, 4) if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.1e}"
