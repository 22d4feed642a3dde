"""How alike LoRA experts are: the cosine of what they add to the base, without forming it.

An expert adds D = B A to a module's weights. The matrices A and B are not unique (M A and B M^-1 add the same), so
their own cosines say little; the cosine of the products does not depend on the form, and takes r x r matrices only:

    <B1 A1, B2 A2> = trace((B2^T B1)(A1 A2^T)) = sum over r1 x r2 of (B1^T B2) * (A1 A2^T)

The scale of each adapter (rsLoRA's too) is part of B. Ranks and target modules may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.experts.recruiting.options import DIVERSITIES

if TYPE_CHECKING:
    import torch

    from xpert.experts.adapters import Adapter, LowRank

__all__ = ["cosines"]

Matrix = NDArray[np.float64]


def cosines(adapters: Sequence[Adapter], form: str = "products") -> Matrix:
    """[n, n] in [-1, 1], symmetric with a diagonal of ones.

    products: the cosine of B A per module, averaged over the modules that either expert changes. A module that only
      one of them changes counts 0; one that neither changes (missing, or B A = 0) does not count. Every module weighs
      the same, as every matrix does in the paper; this is the default.
    whole: the cosine of the whole updates, all modules one vector: modules with large updates decide.
    factors: the paper's form, the cosine of each raw A and each raw B, averaged over the matrices that either has. It
      needs equal ranks, and depends on the form in which an update happens to be written.

    Two experts that change nothing are alike: 1. Raises BadInput for `factors` of unequal ranks. Time O(R^2 (in +
    out)) per module for R, the sum of the experts' ranks; memory O(R (in + out)) of one module at a time.
    Source: arXiv:2408.15915 (factors).
    """
    if form not in DIVERSITIES:
        raise ValueError(f"no such form of diversity: {form!r}")
    names = sorted({name for adapter in adapters for name in adapter.modules})
    parts = [[adapter.modules.get(name) for adapter in adapters] for name in names]
    if form == "factors":
        grams = [gram for name, row in zip(names, parts, strict=True) for gram in _factor_grams(adapters, name, row)]
    else:
        grams = [_product_gram(row) for row in parts]
    if form == "whole":
        grams = [np.sum(grams, axis=0)] if grams else []
    return _mean_cosine(grams, len(adapters))


def _mean_cosine(grams: Sequence[Matrix], count: int) -> Matrix:
    """The mean of the cosines that each Gram matrix [n, n] holds, over those in which either vector is not zero."""
    total, counted = np.zeros((count, count)), np.zeros((count, count))
    for gram in grams:
        norms = np.sqrt(np.diag(gram).clip(min=0))
        there = norms > 0
        norms[~there] = 1
        total += gram / np.outer(norms, norms)
        counted += there[:, None] | there[None, :]
    mean = np.where(counted > 0, total / counted.clip(min=1), 1.0).clip(-1, 1)
    np.fill_diagonal(mean, 1.0)
    return mean


def _product_gram(parts: Sequence[LowRank | None]) -> Matrix:
    """<B_i A_i, B_j A_j> of one module: [n, n], zeros where an expert lacks it. All pairs in two products."""
    import torch

    held = [(index, part) for index, part in enumerate(parts) if part is not None]
    a = torch.cat([part.a.float() for _, part in held])
    b = torch.cat([part.b.float() for _, part in held], dim=1)
    joint = ((b.T @ b).double() * (a @ a.T).double()).cpu().numpy()
    owner = np.zeros((joint.shape[0], len(parts)))
    owner[np.arange(joint.shape[0]), np.repeat([index for index, _ in held], [part.rank for _, part in held])] = 1
    gram: Matrix = owner.T @ joint @ owner
    return gram


def _factor_grams(adapters: Sequence[Adapter], name: str, parts: Sequence[LowRank | None]) -> tuple[Matrix, Matrix]:
    ranks = {part.rank: adapter.key for adapter, part in zip(adapters, parts, strict=True) if part is not None}
    if len(ranks) > 1:
        (one, first), (other, second) = list(ranks.items())[:2]
        raise BadInput(
            f"the raw matrices of {first!r} (rank {one}) and {second!r} (rank {other}) at {name} have no cosine",
            hint="take --diversity products, which compares what the experts add",
        )
    return (
        _vector_gram([None if part is None else part.a for part in parts]),
        _vector_gram([None if part is None else part.b for part in parts]),
    )


def _vector_gram(matrices: Sequence[torch.Tensor | None]) -> Matrix:
    import torch

    size = next(matrix.numel() for matrix in matrices if matrix is not None)
    rows = [torch.zeros(size) if matrix is None else matrix.flatten().float().cpu() for matrix in matrices]
    stacked = torch.stack(rows)
    gram: Matrix = (stacked @ stacked.T).double().numpy()
    return gram
