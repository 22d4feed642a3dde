"""Task arithmetic: the experts' changes added up and scaled, negative weights taking an expert's change away."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Merged, MergeTask

__all__ = ["PLUGIN", "TaskArithmetic"]


@dataclass(frozen=True)
class TaskArithmeticOptions(Config):
    """How strong the sum is."""

    scaling: float = option(1.0, "the whole sum is multiplied by this (the paper's lambda)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < abs(self.scaling) < float("inf"):
            raise BadInput(f"scaling is {self.scaling}; it must be a finite number other than 0")


class TaskArithmetic:
    """lambda sum_e w_e B_e A_e, on the changes B A and never on A and B apart, whose sums have cross terms.

    Exact without a rank (the ranks add up, as in concat), else the nearest of that rank.
    """

    Options = TaskArithmeticOptions
    needs = frozenset[str]()
    cost = "as concat; with a rank as svd"
    source = "Editing Models with Task Arithmetic, arXiv:2212.04089"

    def __init__(self, options: TaskArithmeticOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._truncating import kept_or_truncated

        weights = [weight * self.options.scaling for weight in task.weights]
        return [kept_or_truncated(task.experts, weights, task.rank, tuple(range(len(task.keys))))]


PLUGIN = TaskArithmetic
