"""Mean scores over tasks, and what speaks against comparing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.ranking.points import Scores, as_array

__all__ = ["MEAN_OVER", "Means", "mean_scores", "tasks_to_mean"]

MEAN_OVER = ("common", "own")


@dataclass(frozen=True)
class Means:
    """System -> mean, highest first (equal ones by name); over how many tasks; and what to know before comparing."""

    scores: Mapping[str, float]
    over: str
    tasks: Mapping[str, int]
    warnings: tuple[str, ...]


def mean_scores(scores: Scores, *, over: str = "common", metrics: Mapping[str, str] | None = None) -> Means:
    """The mean score of each system over the `common` tasks, which all systems have, or over its `own`.

    `metrics` (task -> metric) lets it warn where they differ. Means over own tasks compare hard tasks with easy ones,
    and so are warned of where anything is missing. Raises BadInput for a score that is not a number, and where no task
    is common.
    """
    systems, array = as_array(scores)
    used = tasks_to_mean(array, over)
    kept = array[used]
    sums, counts = np.nansum(kept, axis=0), np.isfinite(kept).sum(axis=0)
    means = {s: float(total / count) for s, total, count in zip(systems, sums, counts, strict=True) if count}
    tasks = {s: int(count) for s, count in zip(systems, counts, strict=True)}
    names = [task for task, taken in zip(scores, used, strict=True) if taken]
    warnings = _unequal_metrics(names, metrics or {}) + _unequal_scales(names, kept)
    if np.isnan(array).any():
        warnings += _missing(over, used, tasks)
    ordered = dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))
    return Means(ordered, over, tasks, tuple(warnings))


def tasks_to_mean(array: NDArray[np.float64], over: str) -> NDArray[np.bool_]:
    """[tasks]: which tasks count. Raises BadInput where no task is common to all systems."""
    if over == "own":
        return np.asarray(np.isfinite(array).any(axis=1))
    common = np.asarray(np.isfinite(array).all(axis=1))
    if array.size and not common.any():
        raise BadInput(
            "no task is common to all, so there is no mean to compare",
            hint="take fewer experts, or the mean over each one's own tasks (--mean-over own)",
        )
    return common


def _unequal_metrics(names: Sequence[str], metrics: Mapping[str, str]) -> list[str]:
    counted = Counter(metrics[name] for name in names if name in metrics)
    if len(counted) < 2:
        return []
    told = ", ".join(f"{metric} ({count})" for metric, count in sorted(counted.items()))
    return [f"the mean adds up different metrics: {told}; ranks by borda or kemeny do not"]


def _unequal_scales(names: Sequence[str], array: NDArray[np.float64]) -> list[str]:
    reach = np.nanmax(np.abs(array), axis=1, initial=0.0)
    wide, narrow = (reach > 1).nonzero()[0], (reach <= 1).nonzero()[0]
    if not len(wide) or not len(narrow):
        return []
    return [
        f"the mean adds up different scales: scores of {names[wide[0]]} reach {reach[wide[0]]:g}, "
        f"those of {names[narrow[0]]} stay within 1"
    ]


def _missing(over: str, used: NDArray[np.bool_], tasks: Mapping[str, int]) -> list[str]:
    if over == "common":
        return [f"the mean is over the {used.sum()} of {len(used)} tasks that all experts have"]
    fewer = [f"{system} {count}" for system, count in tasks.items() if count < used.sum()]
    return [f"means are over each expert's own tasks, which are not the same: of {used.sum()}, {', '.join(fewer)}"]
