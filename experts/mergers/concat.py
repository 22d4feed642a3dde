"""The exact weighted sum: the experts' factors one after another, so that the ranks add up."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config
from xpert.errors import BadInput
from xpert.protocols import Merged, MergeTask

__all__ = ["PLUGIN", "Concat"]


@dataclass(frozen=True)
class ConcatOptions(Config):
    """Nothing can be chosen."""


class Concat:
    """sum_e w_e B_e A_e = [w_1 B_1, ...] [A_1; ...]: what the engine computes for a weighted set, as one adapter.

    No error but float32 rounding. The merged rank is the sum of the ranks; a rank cannot be asked for.
    """

    Options = ConcatOptions
    needs = frozenset[str]()
    cost = "time and memory O(d R) for R the sum of the ranks"
    source = "identity of stacked LoRAs; peft's combination type `cat`"

    def __init__(self, options: ConcatOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.low_rank import weighted_sum

        if task.rank is not None:
            raise BadInput(
                f"concat keeps every rank and cannot hold {task.rank}", hint="leave out the rank, or take svd"
            )
        return [Merged(tuple(range(len(task.keys))), task.weights, weighted_sum(task.experts, task.weights))]


PLUGIN = Concat
