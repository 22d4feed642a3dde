"""The matrix factorisation behind router mf: trained with torch, applied with numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["Factors", "Training", "train_factors", "winning_pairs"]

Floats64 = NDArray[np.float64]
Pairs = NDArray[np.int64]
"""[p, 3]: (row, winner, loser)."""

_MOST_PAIRS = 1024
"""Pairs of subjects that are looked at on one prompt, beside those with the base: of 45 subjects all there are."""
_BATCH_ROWS = 64
_ENOUGH_ROWS = 20
_HELD_OUT = 5
_GAIN = 5e-4
_PATIENCE = (10, 100)
"""Epochs and gradient steps that may bring nothing before training ends: of few prompts, an epoch is two steps."""


@dataclass(frozen=True)
class Training:
    dim: int
    constant: bool
    noise: float
    epochs: int
    rate: float
    decay: float
    seed: int


@dataclass(frozen=True)
class Factors:
    """s(m, q) = w . (norm(P_m) * (W1 e(q))): subjects P [m, k], projection W1 [k, d], weights w [k].

    Where there is a `constant`, the last coordinate of e(q) is 1, and d counts it.
    """

    subjects: Floats64
    projection: Floats64
    weights: Floats64
    constant: bool

    def inputs(self, rows: Floats) -> Floats64:
        found = rows.astype(np.float64)
        return np.hstack([found, np.ones((len(found), 1))]) if self.constant else found

    def directions(self) -> Floats64:
        """[m, d]: s(m, q) is the product of subject m's with e(q)."""
        unit = self.subjects / np.maximum(np.linalg.norm(self.subjects, axis=1, keepdims=True), 1e-12)
        found: Floats64 = (unit * self.weights) @ self.projection
        return found

    @staticmethod
    def names() -> tuple[str, ...]:
        return ("factors.subjects", "factors.projection", "factors.weights")

    def tensors(self) -> dict[str, NDArray[Any]]:
        return dict(zip(self.names(), (self.subjects, self.projection, self.weights), strict=True))

    @classmethod
    def restored(cls, tensors: Mapping[str, NDArray[Any]], *, constant: bool) -> Factors:
        subjects, projection, weights = (tensors[name] for name in cls.names())
        return cls(subjects, projection, weights, constant)


def winning_pairs(scores: Floats64, losses: Floats64 | None, *, seed: int) -> Pairs:
    """(row, winner, loser), sorted, wherever the winner has the higher score; of equal scores, the lower loss where
    losses are given. scores and losses [n, m]; the base is the last subject.

    Of up to 1,024 pairs of subjects all are looked at; of more, those with the base, which are what routes are chosen
    by, and 1,024 that are drawn anew for each row. Time and memory O(n min(m^2, m + 1024)).
    """
    rng = np.random.default_rng(seed)
    m = scores.shape[1]
    every = m * (m - 1) // 2 <= _MOST_PAIRS
    one, other = np.triu_indices(m, 1) if every else (np.arange(m - 1), np.full(m - 1, m - 1))
    found = []
    for row, of_row in enumerate(scores):
        a, b = one, other
        if not every:
            drawn = np.sort(rng.integers(m, size=(_MOST_PAIRS, 2)), axis=1)
            a, b = np.unique(np.vstack([drawn[drawn[:, 0] < drawn[:, 1]], np.column_stack([one, other])]), axis=0).T
        first, second = of_row[a] > of_row[b], of_row[b] > of_row[a]
        if losses is not None:
            tied, of_losses = of_row[a] == of_row[b], losses[row]
            first, second = first | tied & (of_losses[a] < of_losses[b]), second | tied & (of_losses[b] < of_losses[a])
        winners, losers = np.r_[a[first], b[second]], np.r_[b[first], a[second]]
        order = np.lexsort((losers, winners))
        found.append(np.column_stack([np.full(len(order), row), winners[order], losers[order]]))
    return np.concatenate(found).astype(np.int64)


def train_factors(rows: Floats, pairs: Pairs, subjects: int, how: Training) -> tuple[Factors, dict[str, Any]]:
    """Adam on the mean BCE of sigma(s_win - s_lose) over the pairs of 64 prompts at a time, by torch on the CPU.

    rows [n, d]; noise is drawn anew for each prompt and epoch, and never on the constant. A fifth of the prompts with
    pairs is held out: training ends when ten epochs, and 100 steps, have lowered the loss on them by less than 0.0005,
    and the epoch before these stays. Below 20 prompts nothing is held out, and all epochs are trained. Also returns
    what is to be told of it. All is drawn by `seed`. Time O(epochs (n d k + n m k + pairs)).
    """
    import torch

    rng = np.random.default_rng(how.seed)
    inputs = np.hstack([rows, np.ones((len(rows), 1), np.float32)]) if how.constant else rows
    d = inputs.shape[1]

    def drawn(values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).requires_grad_()

    parts = [
        drawn(rng.standard_normal((subjects, how.dim))),
        drawn(rng.uniform(-1, 1, (how.dim, d)) / np.sqrt(d)),
        drawn(rng.uniform(-1, 1, how.dim) / np.sqrt(how.dim)),
    ]
    with_pairs = rng.permutation(np.unique(pairs[:, 0]))
    held = with_pairs[::_HELD_OUT] if len(with_pairs) >= _ENOUGH_ROWS else with_pairs[:0]
    kept = np.setdiff1d(with_pairs, held)
    x, won = torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(pairs)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(rows) + 1))

    def margins(part: NDArray[np.int64], noise: torch.Tensor | None) -> torch.Tensor:
        """s_win - s_lose of all pairs of these rows."""
        of_part = torch.from_numpy(np.concatenate([np.arange(starts[row], starts[row + 1]) for row in part]))
        place = torch.from_numpy(np.repeat(np.arange(len(part)), starts[part + 1] - starts[part]))
        given = x[torch.from_numpy(part)]
        unit = torch.nn.functional.normalize(parts[0], dim=1)
        scores = ((given if noise is None else given + noise) @ parts[1].T) @ (unit * parts[2]).T
        return scores[place, won[of_part, 1]] - scores[place, won[of_part, 2]]

    steps = -(-len(kept) // _BATCH_ROWS)
    optimiser = torch.optim.Adam(parts, lr=how.rate, weight_decay=how.decay)
    best, least, best_epoch = [part.detach().clone() for part in parts], float("inf"), 0
    for epoch in range(1, how.epochs + 1):
        shuffled = rng.permutation(kept)
        for start in range(0, len(shuffled), _BATCH_ROWS):
            part = shuffled[start : start + _BATCH_ROWS]
            noise = rng.standard_normal((len(part), d)).astype(np.float32) * np.float32(how.noise)
            if how.constant:
                noise[:, -1] = 0
            loss = torch.nn.functional.softplus(-margins(part, torch.from_numpy(noise))).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        with torch.no_grad():
            loss_now = float(torch.nn.functional.softplus(-margins(held, None)).mean()) if len(held) else -float(epoch)
        if loss_now < least - _GAIN:
            best, least, best_epoch = [part.detach().clone() for part in parts], loss_now, epoch
        in_vain = epoch - best_epoch
        if in_vain >= _PATIENCE[0] and in_vain * steps >= _PATIENCE[1]:
            break
    factors, projection, weights = (part.numpy().astype(np.float64) for part in best)
    made = Factors(factors, projection, weights, how.constant)
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len(with_pairs),
        "epochs": best_epoch,
        "noise": how.noise,
        "rate": how.rate,
        "decay": how.decay,
        "seed": how.seed,
    }
    if len(held):
        own = pairs[np.isin(pairs[:, 0], held)]
        scores = made.inputs(rows) @ made.directions().T
        lead = scores[own[:, 0], own[:, 1]] - scores[own[:, 0], own[:, 2]]
        report |= {"held_out_pairs": len(own), "held_out_accuracy": float((np.sign(lead) + 1).mean() / 2)}
    return made, report
