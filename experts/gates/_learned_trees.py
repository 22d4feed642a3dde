"""Binary trees with n leaves, in heap order: node i has the children 2i + 1 and 2i + 2, nodes from n - 1 on are leaves.

All of a level is computed at once, so a tree costs log2 n steps.
"""

from __future__ import annotations

import torch

__all__ = ["leaf_shares", "reweighed", "smooth_step"]


def smooth_step(t: torch.Tensor, band: float) -> torch.Tensor:
    """0 for t <= -band/2, 1 for t >= band/2, and the cubic that joins them with flat ends between."""
    inside = t.clamp(-band / 2, band / 2)
    soft = -2 * inside**3 / band**3 + 3 * inside / (2 * band) + 0.5
    # At the ends the cubic is 0 and 1 up to rounding; a closed split must be closed exactly.
    return torch.where(t <= -band / 2, 0.0, torch.where(t >= band / 2, 1.0, soft.clamp(0, 1)))


def leaf_shares(right: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """What reaches each leaf.

    right [rows, tokens, trees, n - 1]: the share each node sends to the right; allowed bool [rows, 1, trees, n] ->
    [rows, tokens, trees, n], summing to 1 over allowed leaves, or 0 where none is allowed.
    """
    leaves = allowed.shape[-1]
    open_ = _open_nodes(allowed)
    reach = open_[..., :1].to(right.dtype).expand(*right.shape[:-1], 1)
    found, start = [], 0
    while start < 2 * leaves - 1:
        inner = max(0, min(start + reach.shape[-1], leaves - 1) - start)  # nodes of this level that have children
        found.append(reach[..., inner:])
        if not inner:
            break
        nodes = slice(start, start + inner)
        children = open_[..., 2 * start + 1 : 2 * (start + inner) + 1]
        share = torch.where(children[..., 1::2], torch.where(children[..., 0::2], right[..., nodes], 1.0), 0.0)
        passed = reach[..., :inner]
        start, reach = (
            2 * start + 1,
            torch.stack([passed * (1 - share), passed * share], dim=-1).flatten(-2),
        )
    return torch.cat(found, dim=-1) * allowed


def reweighed(weights: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """weights * exp(bias), scaled to add up to 1 again; zeros stay, and a row of zeros too."""
    used = weights > 0
    lowest = torch.finfo(weights.dtype).min
    logits = torch.where(used, weights, 1.0).log() + bias
    return torch.softmax(logits.masked_fill(~used, lowest), dim=-1) * used


def _open_nodes(allowed: torch.Tensor) -> torch.Tensor:
    """bool [..., 2n - 1]: the nodes under which some leaf is allowed."""
    leaves = allowed.shape[-1]
    nodes = torch.cat([allowed.new_zeros((*allowed.shape[:-1], leaves - 1)), allowed], dim=-1)
    depth = (leaves - 1).bit_length()
    for level in range(depth - 1, -1, -1):
        start, stop = 2**level - 1, min(2 ** (level + 1) - 1, leaves - 1)
        if start < stop:
            nodes[..., start:stop] = (
                nodes[..., 2 * start + 1 : 2 * stop : 2] | nodes[..., 2 * start + 2 : 2 * stop + 1 : 2]
            )
    return nodes
