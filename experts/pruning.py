"""Pruning a mixture: experts dropped by usage, or those that a task's prompts ask for alike merged into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.evaluate import EvalOptions, Evaluation
from xpert.experts.merge_folder import FATE_FILE, write_pool
from xpert.experts.merge_sources import MergeSources
from xpert.experts.merging import merge
from xpert.experts.mixture import Mixture
from xpert.experts.mixture_file import MIXTURE_FILE, write_mixture
from xpert.experts.subjects import Entrant, run_entrants
from xpert.experts.usage import Usage
from xpert.progress import SILENT, Progress
from xpert.records import SuiteItem
from xpert.storage import draft_folder, write_json

__all__ = ["PruneOptions", "Pruned", "prune"]


@dataclass(frozen=True)
class PruneOptions(Config):
    """How the pool is made smaller."""

    method: str = option(
        "usage", "usage: drop what is rarely used; task: merge what prompts ask for alike", choices=("usage", "task")
    )
    below: float = option(0.05, "usage: experts with less than this share of the draws go", minimum=0, maximum=1)
    groups: int | None = option(None, "task: experts that are left; none: half as many, rounded up", minimum=1)
    rank: int | None = option(None, "task: largest rank of a merged module; none: exact, the ranks add up", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "usage" and (self.groups is not None or self.rank is not None):
            raise BadInput("groups and rank belong to method=task", hint="leave them out, or take --method task")
        if self.method == "task" and self.below != PruneOptions.below:
            raise BadInput("below belongs to method=usage", hint="leave it out, or take --method usage")


@dataclass(frozen=True)
class Pruned:
    """The smaller mixture, which of its experts stands for each old one (None: dropped), and `scores`: the subjects
    `before` and `after` on the suite, where one was given."""

    mixture: Mixture
    fate: Mapping[str, str | None]
    usage: Usage
    scores: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": list(self.mixture.keys),
            "fate": dict(self.fate),
            "usage": dict(zip(self.usage.keys, self.usage.shares, strict=True)),
            "left_to_base": self.usage.base,
            "scores": self.scores.to_dict() if self.scores else None,
        }


def prune(
    mixture: Mixture,
    usage: Usage,
    options: PruneOptions | None = None,
    *,
    out: Path,
    items: Sequence[SuiteItem] = (),
    evaluation: EvalOptions | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Pruned:
    """Writes the folder `out` with the smaller `mixture.json` (and merged experts beside it), whole or not at all.

    By usage as Symbolic-MoE drops experts below 5 % of the draws (arXiv:2503.05641); by task as UNCURL merges experts
    whose router scores on the task's prompts are alike (arXiv:2409.01483), weighed by usage. With `items`, both
    mixtures are scored before anything is in place. Raises BadInput where nothing would be left, or nothing would go.
    """
    options = options or PruneOptions()
    if mixture.gate is not None and plugins.load("gate", mixture.gate.name).learned == "mixture":
        raise BadInput(
            f"the mixture's gate {mixture.gate.name} was trained for all its experts",
            hint="mix some of them anew, and train the gate for those",
        )
    with draft_folder(out) as draft:
        if options.method == "usage":
            smaller, fate = _by_usage(mixture, usage, options.below, name=out.name)
            write_json(draft / FATE_FILE, fate)
            write_mixture(draft / MIXTURE_FILE, smaller)
        else:
            smaller, fate = _by_task(draft, mixture, usage, options, name=out.name, seed=seed, progress=progress)
        scores = None
        if items:
            pair = [Entrant("before", mixture.base.ref, mixture), Entrant("after", mixture.base.ref, smaller)]
            settings = evaluation or EvalOptions()
            scores = run_entrants(pair, items, settings, device=device, seed=seed, progress=progress)
            write_json(draft / "scores.json", scores.to_dict())
    return Pruned(smaller, fate, usage, scores)


def _by_usage(mixture: Mixture, usage: Usage, below: float, *, name: str) -> tuple[Mixture, dict[str, str | None]]:
    share = dict(zip(usage.keys, usage.shares, strict=True))
    kept = tuple(expert for expert in mixture.experts if share[expert.key] >= below)
    if not kept:
        most = max(share, key=lambda key: share[key])
        raise BadInput(
            f"no expert has {100 * below:g} % of the draws: {most!r}, the most used, has {100 * share[most]:.1f} %",
            hint="lower --below",
        )
    if len(kept) == len(mixture.experts):
        least = min(share, key=lambda key: share[key])
        raise BadInput(
            f"every expert has {100 * below:g} % of the draws or more: {least!r}, the least used, has "
            f"{100 * share[least]:.1f} %",
            hint="raise --below, or take --method task",
        )
    keys = {expert.key for expert in kept}
    fate = {expert.key: expert.key if expert.key in keys else None for expert in mixture.experts}
    return replace(mixture, experts=kept, name=name, recruited=()), fate


def _by_task(
    draft: Path, mixture: Mixture, usage: Usage, options: PruneOptions, *, name: str, seed: int, progress: Progress
) -> tuple[Mixture, dict[str, str | None]]:
    count = len(mixture.experts)
    sources = MergeSources(mixture.experts, (1.0 / count,) * count, mixture)
    task = sources.task(rank=options.rank, seed=seed, usage=usage.shares, routing=usage.routing)
    params = {"by": "routing", "how": "linkage", "groups": options.groups}
    results = merge(task, "grouped", params)
    smaller = write_pool(draft, results, sources, name=name, seed=seed, progress=progress)
    fate: dict[str, str | None] = dict.fromkeys(mixture.keys)
    for result, expert in zip(results, smaller.experts, strict=True):
        fate |= dict.fromkeys(result.keys, expert.key)
    return smaller, fate
