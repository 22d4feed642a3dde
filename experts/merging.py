"""Merging: weighted experts -> one adapter (or fewer), measured against the exact weighted sum of what went in."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xpert import plugins
from xpert.errors import BadInput
from xpert.protocols import LowRankUpdate, Merged, MergeTask

__all__ = ["MergeError", "MergeResult", "ModuleError", "measure", "merge", "merger_options"]


@dataclass(frozen=True)
class ModuleError:
    """One module: the merged rank (0 where the merge has no update), the exact sum's norm, and the distance to it."""

    rank: int
    norm: float
    distance: float

    @property
    def relative(self) -> float | None:
        """distance / norm; None where the exact sum is zero and the merge is not."""
        if self.norm:
            return self.distance / self.norm
        return None if self.distance else 0.0


@dataclass(frozen=True)
class MergeError:
    """How far a merge is from the exact weighted sum, in the Frobenius norm of the change of the weights."""

    modules: Mapping[str, ModuleError]

    @property
    def total(self) -> float | None:
        """Of all modules as one long vector; None where the exact sum is zero and the merge is not."""
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        distance = math.hypot(*(module.distance for module in self.modules.values()))
        return ModuleError(0, norm, distance).relative

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the greatest relative error (infinite where the sum is zero there), and it."""
        found = {name: math.inf if m.relative is None else m.relative for name, m in self.modules.items()}
        name = max(found, key=lambda name: found[name])
        return name, found[name]

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, "modules": {name: module.relative for name, module in self.modules.items()}}


@dataclass(frozen=True)
class MergeResult:
    """One merged adapter with its error. `keys` are its members' keys; seconds are CPU seconds of the whole merge."""

    method: str
    params: Mapping[str, Any]
    keys: tuple[str, ...]
    merged: Merged
    error: MergeError
    seconds: float = field(compare=False, default=0.0)

    @property
    def rank(self) -> int:
        return max(update.rank for update in self.merged.modules.values())

    @property
    def parameters(self) -> int:
        return sum(update.a.numel() + update.b.numel() for update in self.merged.modules.values())

    def weights(self) -> dict[str, float]:
        """Key -> weight in the exact sum that the merge stands for."""
        return dict(zip(self.keys, self.merged.weights, strict=True))

    def summary(self) -> dict[str, Any]:
        """Plain JSON for a table's line."""
        worst = self.error.worst
        return {
            "method": self.method,
            "params": dict(self.params),
            "weights": self.weights(),
            "rank": self.rank,
            "parameters": self.parameters,
            "error": self.error.total,
            "worst_module": {"name": worst[0], "error": worst[1] if math.isfinite(worst[1]) else None},
            "seconds": round(self.seconds, 3),
        }


def merger_options(method: str, params: Mapping[str, Any]) -> Any:
    """The merger's options, checked; raises BadInput naming an unknown merger or parameter."""
    return plugins.load("merger", method).Options.from_mapping(params, where=f"merger {method}")


def merge(task: MergeTask, method: str, params: Mapping[str, Any] | None = None) -> list[MergeResult]:
    """The adapters that `method` makes of the task's experts: one, or a smaller pool.

    Experts are taken in the order of their keys, so that a result does not depend on the order given, bit for bit.
    Raises BadInput for weights that are no finite numbers or all zero, for a rank below 1, for experts that cannot be
    of one base, and for what the method itself refuses.
    """
    options = merger_options(method, params or {})
    check_task(task)
    begin = time.process_time()
    order = sorted(range(len(task.keys)), key=lambda index: task.keys[index])
    found = plugins.load("merger", method)(options).merge(_ordered(task, order))
    seconds = time.process_time() - begin
    results = []
    for merged in found:
        own = replace(merged, members=tuple(order[member] for member in merged.members))
        for name, update in own.modules.items():
            if not (update.a.isfinite().all() and update.b.isfinite().all()):
                raise BadInput(f"the merge of {name} holds numbers too large for float32", hint="lower the weights")
        keys = tuple(task.keys[member] for member in own.members)
        error = measure(own, [task.experts[member] for member in own.members])
        results.append(MergeResult(method, options.to_dict(), keys, own, error, seconds))
    return results


def measure(merged: Merged, members: Sequence[Mapping[str, LowRankUpdate]]) -> MergeError:
    """The distance of a merge's modules to the exact weighted sum of its members, without a d x d matrix.

    Time O(d R^2) for R the ranks of members and merge together.
    """
    from xpert.experts.low_rank import distance, modules_of

    sums = dict(modules_of(members, merged.weights))
    errors = {}
    for name in sorted({*sums, *merged.modules}):
        own = merged.modules.get(name)
        apart, whole = distance(own, sums.get(name, ()))
        errors[name] = ModuleError(own.rank if own else 0, whole, apart)
    return MergeError(errors)


def check_task(task: MergeTask) -> None:
    """Refuses what no merger can use."""
    if not task.keys or not len(task.keys) == len(task.experts) == len(task.weights):
        raise BadInput(f"{len(task.weights)} weights for {len(task.keys)} experts", hint="give each expert one weight")
    for key, weight in zip(task.keys, task.weights, strict=True):
        if task.keys.count(key) > 1:
            raise BadInput(f"two experts are called {key!r}", hint="name one of them only")
        if not math.isfinite(weight):
            raise BadInput(f"the weight of expert {key!r} is {weight}", hint="weights are finite numbers")
    if not any(task.weights):
        raise BadInput("all weights are zero: nothing would be merged", hint="give one expert another weight")
    if task.rank is not None and task.rank < 1:
        raise BadInput(f"rank is {task.rank}; the least is 1")
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for key, expert in zip(task.keys, task.experts, strict=True):
        for name, update in expert.items():
            shape = (int(update.a.shape[1]), int(update.b.shape[0]))
            first, known = shapes.setdefault(name, (key, shape))
            if known != shape:
                raise BadInput(
                    f"experts of different bases cannot be merged: {name} maps {known[0]} to {known[1]} in {first!r}, "
                    f"but {shape[0]} to {shape[1]} in {key!r}"
                )


def _ordered(task: MergeTask, order: Sequence[int]) -> MergeTask:
    def by_key(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[index] for index in order)

    loss = task.loss
    back = {index: place for place, index in enumerate(order)}
    return replace(
        task,
        keys=by_key(task.keys),
        experts=by_key(task.experts),
        weights=by_key(task.weights),
        usage=None if task.usage is None else by_key(task.usage),
        routing=None if task.routing is None else task.routing[:, list(order)],
        loss=None if loss is None else lambda weights: loss([weights[back[i]] for i in range(len(order))]),
    )
