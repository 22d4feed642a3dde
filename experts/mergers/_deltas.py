"""Merges that look at single entries of the experts' changes D = B A: one module at a time, in blocks of rows.

The result has any rank, so it is factorised back: at the rank asked for, or at the sum of the experts' ranks, and the
log tells what that cut off. Memory: two [out, in] matrices of one module, and the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from xpert.experts.low_rank import factorised, modules_of
from xpert.protocols import LowRankUpdate, Merged, MergeTask

__all__ = ["BLOCK", "delta_blocks", "elected_mean", "merge_entries"]

BLOCK = 1 << 22
"""Entries of all experts together that are looked at in one go."""

Entries = Callable[[str, Sequence[str], Sequence[LowRankUpdate], torch.Tensor], Iterator[torch.Tensor]]
"""(module, keys, updates, weights [e]) -> the merged rows, block after block, as `delta_blocks` cuts them."""


def merge_entries(task: MergeTask, entries: Entries) -> Merged:
    """Every module merged by `entries` and factorised back.

    The log tells `truncation`: the norm of what the factorisation cut off over that of the merged change.
    """
    used = [index for index, weight in enumerate(task.weights) if weight]
    modules, lost, whole = {}, 0.0, 0.0
    for name, parts in modules_of(task.experts, task.weights):
        keys = [task.keys[index] for index in used if name in task.experts[index]]
        weights = torch.tensor([weight for _, weight in parts], dtype=torch.float32)
        delta = torch.cat(list(entries(name, keys, [part for part, _ in parts], weights)))
        modules[name], dropped = factorised(delta, task.rank or sum(part.rank for part, _ in parts))
        lost, whole = math.hypot(lost, dropped), math.hypot(whole, float(delta.double().norm()))
    everyone = tuple(range(len(task.keys)))
    return Merged(everyone, task.weights, modules, {"truncation": lost / whole if whole else 0.0})


def delta_blocks(updates: Sequence[LowRankUpdate]) -> Iterator[torch.Tensor]:
    """The experts' changes [e, rows, in], block after block; the same cuts, and so the same bits, every time."""
    outputs, inputs = updates[0].b.shape[0], updates[0].a.shape[1]
    rows = max(1, BLOCK // (len(updates) * inputs))
    for start in range(0, outputs, rows):
        yield torch.stack([part.b[start : start + rows].float() @ part.a.float() for part in updates])


def elected_mean(changes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """TIES' election and disjoint mean: changes [e, rows, in] and weights [e] -> [rows, in].

    Each entry's sign is that of the weighted sum (a sum of zero counts as positive). The changes that agree with it
    are averaged by their weights' sizes, and the mean is given the weight of all: where all agree, the result is the
    weighted sum, and with equal weights of sum one it is the mean of the paper. Zeros have no sign and do not count.
    """
    sizes = weights.abs()[:, None, None]
    weighted = changes * weights[:, None, None]
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    size = (agrees * sizes).sum(0)
    mean = (weighted * agrees).sum(0) / size.clamp_min(torch.finfo(torch.float32).tiny)
    return mean * sizes.sum()
