"""LoraHub: weights found on the shots by a search without gradients, then merged exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Merged, MergeTask

__all__ = ["PLUGIN", "LoraHub"]


@dataclass(frozen=True)
class LoraHubOptions(Config):
    """The search's limits."""

    evaluations: int = option(40, "weighings that are tried on the shots", minimum=3)
    bound: float = option(1.5, "weights lie between -bound and bound")
    penalty: float = option(0.05, "of a weight's mean size, added to the loss", minimum=0)
    step: float = option(0.5, "how far the first trials lie apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bound", "step"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"{name} is {getattr(self, name)}; it must be a finite number above 0")


class LoraHub:
    """Minimises mean NLL of the shots' answers + penalty * mean |w| over w in [-bound, bound]^n.

    Tried are none of the experts, the given weights, and then what COBYLA (a linear model in a trust region) asks for
    from the better of the two; the best of all counts. Every trial is a weighted set in the engine, not a merge. The
    paper adds up A and B apart, whose product has cross terms; here the sum is exact, or the nearest of a rank.
    """

    Options = LoraHubOptions
    needs = frozenset({"loss"})
    cost = "`evaluations` passes over the shots; then as concat, with a rank as svd"
    source = "LoraHub, arXiv:2307.13269; COBYLA, Powell 1994, doi:10.1007/978-94-015-8330-5_4"

    def __init__(self, options: LoraHubOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._truncating import kept_or_truncated

        if task.loss is None:
            raise BadInput("lorahub finds the weights on shots, and there are none", hint="give --shots FILE")
        trials = _Trials(task.loss, self.options)
        self._search(trials, task.weights)
        weights, value = trials.best()
        if not any(weights):
            raise BadInput(
                f"none of {len(trials.tried)} weighings of the experts does better on the shots than the base model "
                f"alone (loss {value:.4f})",
                hint="take other experts, or raise evaluations",
            )
        merged = kept_or_truncated(task.experts, weights, task.rank, tuple(range(len(task.keys))))
        log = {**merged.log, "objective": value, "trials": trials.log(task.keys)}
        return [Merged(merged.members, merged.weights, merged.modules, log)]

    def _search(self, trials: _Trials, given: Sequence[float]) -> None:
        import numpy as np
        from scipy.optimize import minimize

        bound = self.options.bound
        none = [0.0] * len(given)
        start = [min(max(weight, -bound), bound) for weight in given]
        try:
            first = min((trials(none), 0, none), (trials(start), 1, start))[2]
            minimize(
                lambda weights: trials(np.clip(weights, -bound, bound).tolist()),
                np.array(first),
                method="COBYLA",
                bounds=[(-bound, bound)] * len(given),
                options={"rhobeg": min(self.options.step, bound), "maxiter": 10 * self.options.evaluations},
            )
        except _SpentError:
            pass


class _SpentError(Exception):
    """All evaluations are used."""


class _Trials:
    """The objective, counted; weights tried before cost nothing."""

    def __init__(self, loss: Callable[[Sequence[float]], float], options: LoraHubOptions) -> None:
        self.loss = loss
        self.options = options
        self.tried: dict[tuple[float, ...], tuple[float, float]] = {}

    def __call__(self, weights: Sequence[float]) -> float:
        # Six digits tell weights apart, and let a search that has converged stop costing passes.
        key = tuple(round(weight, 6) + 0.0 for weight in weights)
        if key not in self.tried:
            if len(self.tried) >= self.options.evaluations:
                raise _SpentError
            loss = self.loss(key)
            size = sum(abs(weight) for weight in key) / len(key)
            self.tried[key] = (loss + self.options.penalty * size, loss)
        return self.tried[key][0]

    def best(self) -> tuple[tuple[float, ...], float]:
        """The weights of the least objective, the first of equals, and it."""
        weights = min(self.tried, key=lambda key: self.tried[key][0])
        return weights, self.tried[weights][0]

    def log(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"weights": dict(zip(keys, weights, strict=True)), "objective": objective, "loss": loss}
            for weights, (objective, loss) in self.tried.items()
        ]


PLUGIN = LoraHub
