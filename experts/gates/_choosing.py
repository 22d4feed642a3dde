"""From logits to weights: the softmax over the experts a token takes, for gates of every kind.

Tensor code, imported by gates inside `at`. All of it is exact about three things: an expert that is not allowed gets
0, a token without any allowed expert gets zeros and no NaN (under autograd too), and ties go to the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_allowed", "softmax_allowed", "softmax_top_k", "softmax_top_p"]

_RULED_OUT = torch.finfo(torch.float32).min
"""The logit of an expert that is not allowed. Finite, so that a softmax over nothing else is no NaN."""

_PICKED_ONE_BY_ONE = 4
"""Up to this k, k maxima cost less than a stable sort (64 x 64 tokens, 16 experts, CPU: 0.9 against 3.2 ms)."""


def softmax_allowed(logits: Tensor, allowed: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the allowed experts.

    logits [..., e], allowed bool, broadcastable to it -> float32 [..., e]; sums are 1, or 0 where nothing is allowed.
    """
    return torch.softmax(_masked(logits, allowed, temperature), dim=-1) * allowed


def softmax_top_k(logits: Tensor, allowed: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the k largest logits of the allowed experts; all of them where k >= e.

    Shapes as in `softmax_allowed`. Where fewer than k are allowed, those are taken. Ties go to the lowest index.
    """
    experts = logits.shape[-1]
    if k >= experts:
        return softmax_allowed(logits, allowed, temperature)
    masked = _masked(logits, allowed, temperature)
    values, places = _largest(masked, k)
    weights = torch.softmax(values, dim=-1)
    return torch.zeros_like(masked).scatter(-1, places, weights) * allowed


def softmax_top_p(logits: Tensor, allowed: Tensor, p: float, temperature: float = 1.0) -> Tensor:
    """softmax over the smallest set of allowed experts whose probability reaches p, renormalised; one at least.

    The probabilities are those of `softmax_allowed`. p >= 1 keeps all. Shapes and ties as in `softmax_top_k`.
    """
    whole = softmax_allowed(logits, allowed, temperature)
    if p >= 1:
        return whole
    ordered, places = torch.sort(whole, dim=-1, descending=True, stable=True)
    before = torch.cumsum(ordered, dim=-1) - ordered
    kept = ordered * ((before < p) | _first(ordered))
    total = kept.sum(-1, keepdim=True)
    # Where nothing is allowed all are zero, and zeros stay.
    return torch.zeros_like(whole).scatter(-1, places, kept / torch.where(total > 0, total, 1.0))


def all_allowed(hidden: Tensor, allowed: Tensor) -> Tensor:
    """Weight 1 for every allowed expert at every token: hidden [rows, tokens, in], allowed [rows, 1, e] -> float32."""
    return allowed.float().expand(-1, hidden.shape[1], -1).contiguous()


def _masked(logits: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return torch.where(allowed, logits, _RULED_OUT)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest and their indices [..., k], best first, ties by index, which torch.topk does not promise."""
    if k > _PICKED_ONE_BY_ONE:
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        return ordered[..., :k], order[..., :k]
    left, values, places = logits, [], []
    for turn in range(k):
        value, place = left.max(dim=-1, keepdim=True)  # the first of equal maxima
        values.append(value)
        places.append(place)
        if turn + 1 < k:
            left = left.scatter(-1, place, -torch.inf)  # under those ruled out, which may be picked but weigh nothing
    return (values[0], places[0]) if k == 1 else (torch.cat(values, dim=-1), torch.cat(places, dim=-1))


def _first(ordered: Tensor) -> Tensor:
    """bool [e]: the first place alone."""
    return torch.arange(ordered.shape[-1], device=ordered.device) == 0
