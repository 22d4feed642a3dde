"""Drawing rows without replacement with chances that follow their scores: Gumbel top-k."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["gumbel_order"]


def gumbel_order(logits: NDArray[np.floating], tau: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """All rows [n] in the order of successive draws, each with chances in proportion to exp(logit / tau).

    tau = 0 is the order of the logits, ties by the lowest index. Every beginning of the order is a sample without
    replacement. Time O(n log n). Source: Kool et al. 2019, arXiv:1903.06059.
    """
    values = np.asarray(logits, np.float64)
    if tau > 0:
        # logits + tau * noise orders as logits / tau + noise does, and a small tau divides nothing by zero.
        values = values + tau * rng.gumbel(size=len(values))
    return np.argsort(-values, kind="stable").astype(np.int64)
