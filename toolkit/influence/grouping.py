"""Groups of target rows: the mean of each, and how several are made comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.records import Shots

if TYPE_CHECKING:
    import torch

__all__ = ["comparable", "mean_weights", "shot_groups"]

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
    return np.asarray(member / counts, np.float32)


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


def shot_groups(shots: Shots, column: str) -> tuple[list[str], tuple[int, ...]]:
    """(names of the groups, group of each shot) by a column of the shots; `none`: all are one.

    Shots without a skill are a group of their own. Raises BadInput where another column is missing in a shot.
    """
    if column == "none":
        return ["all shots"], (0,) * len(shots)
    values = [row.skill if column == "skill" else row.columns.get(column) for row in shots]
    if column != "skill" and any(value is None for value in values):
        there = sorted({name for row in shots for name in row.columns})
        lacking = shots.rows[values.index(None)].id
        raise BadInput(
            f"shot {lacking} has no column {column!r}", hint=f"group by one of {', '.join(there) or 'none'}, or by none"
        )
    words = [f"{column} {value}" if value is not None else "shots without a skill" for value in values]
    names = list(dict.fromkeys(words))
    return names, tuple(names.index(word) for word in words)
