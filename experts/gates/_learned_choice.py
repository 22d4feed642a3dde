"""The arithmetic of choosing: which logits stay, and the softmax over those that do. Nothing here gives NaN."""

from __future__ import annotations

import torch

__all__ = ["logits_of", "softmax_over", "top_k", "top_p"]


def logits_of(hidden: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden [rows, tokens, in], router [c, in] -> float32 logits [rows, tokens, c]."""
    logits = torch.nn.functional.linear(hidden.float(), router.float())
    return logits if bias is None else logits + bias


def top_k(scores: torch.Tensor, allowed: torch.Tensor, k: int) -> torch.Tensor:
    """bool [..., c]: the k best allowed scores of each row, all of them where fewer are allowed or k is 0.

    Of equal scores the lower index is taken, which `topk` alone does not promise.
    """
    allowed = allowed.expand(scores.shape)
    if k == 0 or k >= scores.shape[-1]:
        return allowed
    kept = scores.detach().masked_fill(~allowed, -torch.inf)
    least = kept.topk(k, dim=-1).values[..., -1:]
    above, equal = kept > least, kept == least
    chosen = above | (equal & (equal.cumsum(-1) + above.sum(-1, keepdim=True) <= k))
    return chosen & allowed


def top_p(probabilities: torch.Tensor, allowed: torch.Tensor, mass: float) -> torch.Tensor:
    """bool [..., c]: the smallest set of the likeliest whose probability exceeds `mass`; all where mass is 1."""
    allowed = allowed.expand(probabilities.shape)
    if mass >= 1:
        return allowed
    found = probabilities.detach().sort(dim=-1, descending=True, stable=True)
    before = found.values.cumsum(-1) - found.values
    before[..., 0] = 0
    kept = torch.zeros_like(allowed).scatter(-1, found.indices, before <= mass)
    return kept & allowed


def softmax_over(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Softmax over the chosen, 0 elsewhere; a row without any is 0 throughout, and has no gradient."""
    lowest = torch.finfo(logits.dtype).min
    return torch.softmax(logits.masked_fill(~chosen, lowest), dim=-1) * chosen
