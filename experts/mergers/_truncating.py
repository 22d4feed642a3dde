"""The weighted sum at a given rank, and what the cut took away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from xpert.experts.low_rank import concat, modules_of, norm, truncated, weighted_sum
from xpert.protocols import LowRankUpdate, Merged

__all__ = ["kept_or_truncated", "truncated_sum"]


def truncated_sum(
    experts: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float], rank: int | None, members: tuple[int, ...]
) -> Merged:
    """The nearest adapter to the sum with at most `rank` per module (None: the largest rank of the experts there).

    Its log tells `truncation`: the norm of what was cut off over the sum's, known from the dropped singular values.
    """
    modules, lost, whole = {}, 0.0, 0.0
    for name, parts in modules_of(experts, weights):
        exact = concat(parts)
        modules[name], dropped = truncated(exact, rank or max(part.rank for part, _ in parts))
        lost, whole = math.hypot(lost, dropped), math.hypot(whole, norm(exact))
    return Merged(members, tuple(weights), modules, {"truncation": lost / whole if whole else 0.0})


def kept_or_truncated(
    experts: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float], rank: int | None, members: tuple[int, ...]
) -> Merged:
    """The exact sum where no rank is asked for, else the nearest of that rank."""
    if rank is None:
        return Merged(members, tuple(weights), weighted_sum(experts, weights))
    return truncated_sum(experts, weights, rank, members)
