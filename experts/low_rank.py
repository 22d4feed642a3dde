"""Algebra of low-rank updates D = b a (a [r, in], b [out, r]) that never forms D [out, in].

Everything is computed in float64 and given back in float32. With d = max(in, out) and R the ranks' sum, the cost is
O(d R^2) in time and O(d R) in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from xpert.experts.adapters import LowRank
from xpert.protocols import LowRankUpdate

__all__ = [
    "concat",
    "core",
    "distance",
    "factorised",
    "inner_products",
    "modules_of",
    "norm",
    "truncated",
    "weighted_sum",
]

Weighted = Sequence[tuple[LowRankUpdate, float]]
"""Updates of one module with their weights."""


def modules_of(
    experts: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float]
) -> Iterator[tuple[str, Weighted]]:
    """Each module that an expert of weight other than zero changes, by name, with those experts' updates."""
    held = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight]
    for name in sorted({name for expert, _ in held for name in expert}):
        yield name, [(expert[name], weight) for expert, weight in held if name in expert]


def concat(parts: Weighted) -> LowRank:
    """sum_e w_e b_e a_e exactly, as [w_1 b_1, ...] [a_1; ...]: the rank is the sum of the ranks."""
    a = torch.cat([part.a.float() for part, _ in parts])
    b = torch.cat([(part.b.double() * weight).float() for part, weight in parts], dim=1)
    return LowRank(a, b)


def weighted_sum(experts: Sequence[Mapping[str, LowRankUpdate]], weights: Sequence[float]) -> dict[str, LowRank]:
    """The exact weighted sum of adapters, module by module."""
    return {name: concat(parts) for name, parts in modules_of(experts, weights)}


def core(part: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q_b [out, q], C [q, p], Q_a [in, p]) with b a = Q_b C Q_a^T, by a QR of each factor; q, p <= r."""
    q_b, r_b = torch.linalg.qr(part.b.double())
    q_a, r_a = torch.linalg.qr(part.a.double().T)
    return q_b, r_b @ r_a.T, q_a


def truncated(part: LowRankUpdate, rank: int) -> tuple[LowRank, float]:
    """The nearest update of at most this rank in the Frobenius norm, and its distance from `part`.

    The distance is that of the dropped singular values (Eckart and Young 1936, doi:10.1007/BF02288367).
    """
    q_b, middle, q_a = core(part)
    u, values, v = torch.linalg.svd(middle)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    b, a = (q_b @ u[:, :kept]) * root, (v[:kept] @ q_a.T) * root[:, None]
    return LowRank(a.float().contiguous(), b.float().contiguous()), float(values[kept:].norm())


def factorised(delta: torch.Tensor, rank: int) -> tuple[LowRank, float]:
    """A dense update [out, in] as its nearest one of at most this rank, and the distance.

    By the eigenvectors of the Gram matrix of the shorter side: a projection onto them is as near as the singular
    vectors allow. Time O(s^2 l) for sides s <= l.
    """
    tall = delta.shape[0] > delta.shape[1]
    wide = (delta.T if tall else delta).double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    basis = vectors.flip(1)[:, : min(rank, len(wide))]
    image = basis.T @ wide
    # The squares of singular values reach from tiny to huge; both factors shall be of one size.
    root = image.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    left, right = (basis * root).float().contiguous(), (image / root[:, None]).float().contiguous()
    lost = float((wide - basis @ image).norm())
    return (LowRank(left.T.contiguous(), right.T.contiguous()) if tall else LowRank(right, left)), lost


def norm(part: LowRankUpdate) -> float:
    """The Frobenius norm of b a."""
    return float(core(part)[1].norm())


def distance(part: LowRankUpdate | None, parts: Weighted) -> tuple[float, float]:
    """(distance of `part` from the weighted sum of `parts`, the sum's norm), in the Frobenius norm; None is no update.

    By a QR of the concatenated factors, which loses nothing where the two are nearly equal, as differences of traces
    would.
    """
    stacked = [(update.a.double(), update.b.double() * weight) for update, weight in parts]
    if not stacked:
        return (norm(part) if part else 0.0), 0.0
    whole = _stack(stacked)
    apart = whole if part is None else _stack([*stacked, (part.a.double(), -part.b.double())])
    return norm(apart), norm(whole)


def _stack(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> LowRank:
    return LowRank(torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1))


def inner_products(experts: Sequence[Mapping[str, LowRankUpdate]]) -> torch.Tensor:
    """<D_i, D_j> of whole adapters, float64 [n, n]: sums over modules of tr((b_i^T b_j)(a_j a_i^T)), r x r traces.

    A module that one of the two lacks adds nothing. Divided by the norms on both sides it is their cosine.
    """
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in sorted({name for expert in experts for name in expert}):
        held = [index for index, expert in enumerate(experts) if name in expert]
        parts = [experts[index][name] for index in held]
        a = torch.cat([part.a.double() for part in parts])
        b = torch.cat([part.b.double() for part in parts], dim=1)
        products = (a @ a.T) * (b.T @ b)
        owner = torch.repeat_interleave(torch.tensor(held), torch.tensor([part.rank for part in parts]))
        rows = torch.zeros(len(experts), products.shape[1], dtype=torch.float64).index_add_(0, owner, products.cpu())
        total += torch.zeros_like(total).index_add_(1, owner, rows)
    return total
