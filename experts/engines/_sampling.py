"""Choosing the next token of each row by its own rules and its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from xpert.errors import BadInput
from xpert.protocols import Sampling

__all__ = ["Chooser", "check_sampling", "choose"]


class Chooser:
    """One request's sampling rules and its stream of random numbers, which nothing else in the batch draws from."""

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self._random = np.random.default_rng(sampling.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def draw(self) -> float:
        """A number in [0, 1); one per token."""
        return float(self._random.random())


def check_sampling(sampling: Sampling, *, where: str) -> None:
    """Raises BadInput for values that make no sense, naming them."""
    if sampling.max_tokens < 1:
        raise BadInput(f"max-tokens is {sampling.max_tokens}; the least is 1", where=where)
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise BadInput(f"temperature is {sampling.temperature}; the least is 0", where=where)
    if not 0 < sampling.top_p <= 1:
        raise BadInput(f"top-p is {sampling.top_p}; it must be above 0 and at most 1", where=where)
    if "" in sampling.stop:
        raise BadInput("a stop string is empty", where=where)
    if sampling.seed is not None and sampling.seed < 0:
        raise BadInput(f"seed is {sampling.seed}; the least is 0", where=where)


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row; -1 for a row whose logits are not numbers.

    logits [rows, vocabulary], any float dtype. Each row is decided by its own logits and its own chooser alone.
    """
    best, tokens = logits.max(dim=-1)  # NaN wins a maximum, so one check finds it
    chosen: list[int] = torch.where(best.isfinite(), tokens, -1).tolist()
    rows = [row for row, chooser in enumerate(choosers) if not chooser.greedy and chosen[row] >= 0]
    if rows:
        for row, token in zip(rows, _sample(logits[rows].float(), [choosers[row] for row in rows]), strict=True):
            chosen[row] = token
    return chosen


def _sample(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse-CDF sampling from the smallest set of likeliest tokens whose probability reaches top-p."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / column([c.temperature for c in choosers])
    probability, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = probability.cumsum(-1)
    kept = probability * (total - probability < column([c.top_p for c in choosers]))
    total = kept.cumsum(-1)
    target = column([c.draw() for c in choosers]) * total[:, -1:]
    place = torch.searchsorted(total, target, right=True).clamp(max=logits.shape[-1] - 1)
    # Rounding could put the place behind the last kept token.
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    picked: list[int] = tokens.gather(-1, place)[:, 0].tolist()
    return picked
