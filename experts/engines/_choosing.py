"""What the tokens of a step are chosen by: the model's logits, contrasted and constrained request by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xpert.errors import XpertError
from xpert.experts.engines._requests import InFlight

__all__ = ["constrained", "contrasted"]


def contrasted(
    requests: Sequence[InFlight], own: torch.Tensor, logits: torch.Tensor, place: Mapping[int, int]
) -> torch.Tensor:
    """`own` [requests, vocabulary], where requests with a decoder are contrasted with their second lane's row.

    `place`: row in `logits` by the lane's id.
    """
    groups: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        if request.decoder is not None:
            groups.setdefault(id(request.decoder), []).append(row)
    if not groups:
        return own
    result = own.float().clone()
    for rows in groups.values():
        decoder = requests[rows[0]].decoder
        assert decoder is not None
        other = logits[[place[id(requests[row].lanes[1])] for row in rows]]
        result[rows] = decoder.combine(own[rows], other).float()
    return result


def constrained(
    requests: Sequence[InFlight], scores: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, dict[int, XpertError]]:
    """`scores` with -inf where a request's constraint forbids a token, and row -> error of constraints that failed.

    All [requests, vocabulary]. Where a contrast has ruled out all that the constraint allows, the model's `own` logits
    decide among that. Rows without a constraint stay as they are, bit by bit. Cost: the masks are made on the host,
    one after the other.
    """
    masks, rows, failed = [], [], {}
    for row, request in enumerate(requests):
        if request.guide is None:
            continue
        try:
            masks.append(_fitted(request.guide.mask(), scores.shape[-1]))
            rows.append(row)
        except XpertError as error:
            failed[row] = error
    if not rows:
        return scores, failed
    forbidden = torch.from_numpy(~np.stack(masks)).to(scores.device)
    allowed = scores[rows].masked_fill(forbidden, -torch.inf)
    ruled_out = allowed.amax(-1, keepdim=True) == -torch.inf
    if bool(ruled_out.any()):
        allowed = torch.where(ruled_out, own[rows].to(scores.dtype).masked_fill(forbidden, -torch.inf), allowed)
    result = scores.clone()
    result[rows] = allowed
    return result, failed


def _fitted(mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """The mask for a vocabulary of `size`: a model may have more tokens than its tokenizer, or fewer."""
    return mask[:size] if len(mask) >= size else np.pad(mask, (0, size - len(mask)))
