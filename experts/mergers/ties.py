"""TIES: small changes trimmed away, signs elected, and only the changes that agree averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import LowRankUpdate, Merged, MergeTask

if TYPE_CHECKING:
    import torch

__all__ = ["PLUGIN", "Ties"]


@dataclass(frozen=True)
class TiesOptions(Config):
    """How much of each expert stays, and how strong the result is."""

    density: float = option(0.2, "share of the entries of a module's change that stay, the largest", maximum=1)
    scaling: float = option(1.0, "the merged change is multiplied by this (the paper's lambda)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.density > 0:
            raise BadInput(f"density is {self.density}; nothing would stay", hint="write a share such as 0.2")
        if not 0 < abs(self.scaling) < float("inf"):
            raise BadInput(f"scaling is {self.scaling}; it must be a finite number other than 0")


class Ties:
    """Trim, elect sign, disjoint merge, on the changes B A module by module (not on A and B apart, as peft's `ties`).

    Of each expert's change the `density` largest entries by size stay (equal ones by lowest index); each entry's sign
    is elected by the weighted sum; the agreeing changes are averaged by weight, so that weights of sum one give the
    paper's merge. Factorised back to `rank`, by default the sum of the experts' ranks.
    """

    Options = TiesOptions
    needs = frozenset[str]()
    cost = "time O(d^2 R + d^3) a module, memory of two d x d matrices"
    source = "TIES-Merging, arXiv:2306.01708"

    def __init__(self, options: TiesOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._deltas import merge_entries

        return [merge_entries(task, self._entries)]

    def _entries(
        self, module: str, keys: Sequence[str], updates: Sequence[LowRankUpdate], weights: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        from xpert.experts.mergers._deltas import delta_blocks, elected_mean

        trims = [_Trim(updates, index, self.options.density) for index in range(len(updates))]
        for block in delta_blocks(updates):
            for trim, change in zip(trims, block, strict=True):
                trim.apply(change)
            yield elected_mean(block, weights) * self.options.scaling


class _Trim:
    """Zeroes all but the largest entries of one expert's change, given block by block in order."""

    def __init__(self, updates: Sequence[LowRankUpdate], index: int, density: float) -> None:
        import torch

        from xpert.experts.mergers._deltas import delta_blocks

        sizes = torch.cat([block[index].abs().flatten() for block in delta_blocks(updates)])
        count = max(1, int(density * sizes.numel()))
        self.least = sizes.kthvalue(sizes.numel() - count + 1).values
        self.equal = count - int((sizes > self.least).sum())
        """How many entries of just that size may stay."""

    def apply(self, change: torch.Tensor) -> None:
        """Zeroes in place."""
        sizes = change.abs()
        level = sizes == self.least
        places = level.flatten().cumsum(0).view_as(level)
        change[(sizes < self.least) | (level & (places > self.equal))] = 0
        self.equal = max(0, self.equal - int(level.sum()))


PLUGIN = Ties
