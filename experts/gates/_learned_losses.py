"""What keeps routers from sending all tokens one way. Each is over the real tokens alone: padding does not count.

probabilities and chosen [rows, tokens, c], mask bool [rows, tokens]; each returns a scalar.
"""

from __future__ import annotations

import torch

__all__ = ["entropy", "localised_balance", "null_balance", "switch_balance"]


def switch_balance(probabilities: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """c * sum_e f_e P_e: f the share of tokens that choose e, P its mean probability.

    Its least value is k, the number of choices a token, where all are chosen alike. Source: Switch Transformer, as
    MixLoRA counts it, arXiv:2404.15159.
    """
    share = chosen[mask].float().mean(0)
    return probabilities.shape[-1] * (share * probabilities[mask].mean(0)).sum()


def null_balance(probabilities: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor, experts: int) -> torch.Tensor:
    """c * sum_e f_e P_e with f the share of slots, and for the null experts (those from `experts` on) their mean share:
    which of them is chosen makes no difference. Source: AdaMoE, arXiv:2406.13233."""
    counts = chosen[mask].float().sum(0)
    share = counts / counts.sum().clamp_min(1)
    share = torch.cat([share[:experts], share[experts:].mean().expand(len(share) - experts)])
    return probabilities.shape[-1] * (share * probabilities[mask].mean(0)).sum()


def localised_balance(
    probabilities: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor, first: torch.Tensor, delta: float
) -> torch.Tensor:
    """var(Z) / mean(Z)^2 of Z = I * Q: Q[m, e] the mean probability of expert e over the tokens of row m, and I 1 +
    delta where a row of kind 1 meets the first half of the experts or a row of kind 0 the second, else 1 - delta.

    kinds [rows] 0 or 1; first bool [c]. It is least where Z is flat, so rows of kind 1 send less to the first half.
    Q is a mean, not a sum, over tokens: else rows of unequal lengths could never be flat. Source: LoRAMoE,
    arXiv:2312.09979.
    """
    tokens = mask.sum(1, keepdim=True).clamp_min(1)
    q = (probabilities * mask[..., None]).sum(1) / tokens
    raised = kinds.bool()[:, None] == first[None, :]
    z = q * torch.where(raised, 1 + delta, 1 - delta)
    if z.numel() < 2:
        return z.sum() * 0
    return z.var() / (z.mean() ** 2 + 1e-10)


def entropy(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of -sum p ln p, in nats; over all leading dimensions between tokens and choices too."""
    found = probabilities[mask]
    # xlogy's gradient at 0 is that of log: infinite, though p ln p is flat enough there for what is exactly 0.
    safe = found.clamp_min(torch.finfo(found.dtype).tiny)
    return -(found * safe.log()).sum(-1).mean()
