"""Mean-pooled transformer states over batches of rows of like length; what `minilm` and `lm` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xpert.embedding import normalise
from xpert.progress import Progress
from xpert.protocols import Floats

if TYPE_CHECKING:
    import torch

__all__ = ["mean_pooled"]

_TOKENS_PER_BATCH = 8192


def mean_pooled(
    encoded: Sequence[Sequence[int]],
    states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    dimensions: int,
    pad: int,
    device: torch.device,
    progress: Progress,
    title: str,
    tokens_per_batch: int = _TOKENS_PER_BATCH,
) -> Floats:
    """Token ids per text -> float32 [n, d]: the mean of the last states over each text's own tokens, of length 1.

    `states(ids [b, t], mask [b, t]) -> [b, t, d]`. Texts are taken longest first in batches of up to
    `tokens_per_batch` tokens with padding, right-padded; a text without tokens gives a zero row.
    """
    import torch

    rows = np.zeros((len(encoded), dimensions), np.float32)
    lengths = np.fromiter((len(ids) for ids in encoded), np.int64, len(encoded))
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    # Counted in tokens: long texts come first, and a rate in texts would promise far too long a wait.
    with progress.task(f"{title}, tokens", total=int(lengths.sum())) as task, torch.inference_mode():
        start = 0
        while start < len(order):
            width = int(lengths[order[start]])
            batch = order[start : start + max(1, tokens_per_batch // width)]
            ids = torch.full((len(batch), width), pad, dtype=torch.long)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for at, row in enumerate(batch):
                ids[at, : lengths[row]] = torch.tensor(encoded[row], dtype=torch.long)
                mask[at, : lengths[row]] = 1
            hidden = states(ids.to(device), mask.to(device)).float()
            weight = mask.to(device).unsqueeze(-1).float()
            means = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
            rows[batch] = normalise(means.cpu().numpy())
            task.advance(int(lengths[batch].sum()), f"{start + len(batch):,} of {len(encoded):,} texts")
            start += len(batch)
    return rows
