"""Groups of target rows: the mean of each, and how several are made comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = ["comparable", "mean_weights"]

_LEAST = 1e-30


def mean_weights(groups: Sequence[int], readable: NDArray[np.bool_], max_length: int) -> NDArray[np.float32]:
    """[K, G]: what each target counts in the mean of each group, `groups` [K] numbering from 0.

    Targets without room for an answer count nothing; raises BadInput where a group has no other.
    """
    numbers = np.array(groups)
    member = (numbers[:, None] == np.arange(numbers.max() + 1)) & readable[:, None]
    counts = member.sum(axis=0)
    if not counts.all():
        raise BadInput(
            f"no target of group {int(counts.argmin()) + 1} has room for its answer in {max_length} tokens",
            hint="raise --max-length, or give shorter shots",
        )
    return (member / counts).astype(np.float32)


def comparable(directions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """[G, ...] by layer: several groups at unit length over all layers, one as it is; no gradient at all stays 0."""
    parts = list(directions.values())
    if len(parts[0]) == 1:
        return directions
    squares = parts[0].flatten(1).double().square().sum(1)
    for part in parts[1:]:
        squares = squares + part.flatten(1).double().square().sum(1)
    lengths = squares.sqrt().clamp(min=_LEAST).float()
    return {name: v / lengths.view(-1, *[1] * (v.dim() - 1)) for name, v in directions.items()}
