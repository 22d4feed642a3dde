"""The nearest adapter of a given rank to the exact weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config
from xpert.protocols import Merged, MergeTask

__all__ = ["PLUGIN", "Svd"]


@dataclass(frozen=True)
class SvdOptions(Config):
    """Only the rank can be chosen."""


class Svd:
    """The weighted sum, cut to its largest singular values; by default to the largest rank among the experts there.

    Two QRs and an SVD of R_B R_A^T, never a d x d matrix. No adapter of that rank is nearer in the Frobenius norm.
    """

    Options = SvdOptions
    needs = frozenset[str]()
    cost = "time O(d R^2), memory O(d R) for R the sum of the ranks"
    source = "Eckart and Young 1936, doi:10.1007/BF02288367"

    def __init__(self, options: SvdOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._truncating import truncated_sum

        return [truncated_sum(task.experts, task.weights, task.rank, tuple(range(len(task.keys))))]


PLUGIN = Svd
