"""DARE: entries of each expert's change dropped at random and the rest scaled up, before they are added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import LowRankUpdate, Merged, MergeTask

if TYPE_CHECKING:
    import torch

__all__ = ["PLUGIN", "Dare"]


@dataclass(frozen=True)
class DareOptions(Config):
    """How much of each expert stays, and how the rest is joined."""

    density: float = option(0.5, "chance of an entry of a module's change to stay; it is then divided by it", maximum=1)
    elect: bool = option(False, "elect signs and average the agreeing changes as TIES does, in place of the sum")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.density > 0:
            raise BadInput(f"density is {self.density}; nothing would stay", hint="write a share such as 0.5")


class Dare:
    """Drop and rescale, on the changes B A module by module; the expectation is the weighted sum (without `elect`).

    What is dropped depends on the seed, the expert's key and the module alone. Sparse changes have full rank:
    factorised back to `rank`, by default the sum of the experts' ranks, the log tells how much was cut off.
    """

    Options = DareOptions
    needs = frozenset[str]()
    cost = "time O(d^2 R + d^3) a module, memory of two d x d matrices"
    source = "Language Models are Super Mario, arXiv:2311.03099"

    def __init__(self, options: DareOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._deltas import merge_entries

        return [merge_entries(task, partial(self._entries, task.seed))]

    def _entries(
        self, seed: int, module: str, keys: Sequence[str], updates: Sequence[LowRankUpdate], weights: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        import numpy as np
        import torch

        from xpert.experts.mergers._deltas import delta_blocks, elected_mean

        chances = [np.random.default_rng(_seed(seed, key, module)) for key in keys]
        for block in delta_blocks(updates):
            for chance, change in zip(chances, block, strict=True):
                stays = chance.random(tuple(change.shape), dtype=np.float32) < self.options.density
                change.mul_(torch.from_numpy(stays)).div_(self.options.density)
            if self.options.elect:
                yield elected_mean(block, weights)
            else:
                yield torch.einsum("e,eoi->oi", weights, block)


def _seed(seed: int, key: str, module: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}\n{module}".encode()).digest()[:8], "little")


PLUGIN = Dare
