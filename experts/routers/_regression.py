"""From prompt embeddings to a number per subject: a ridge regression, or a small network. Applied by numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.protocols import Floats

__all__ = ["PENALTIES", "LeftOut", "Mlp", "Ridge", "left_out_residuals"]

Floats64 = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4))
"""Ridge penalties tried, in the units of a sum of squares over prompts; embeddings have length 1 at most."""


@dataclass(frozen=True)
class LeftOut:
    """What was predicted of training prompts by fits that did not see them: rows [k] int64, predicted [k, m]."""

    rows: NDArray[np.int64]
    predicted: Floats64


@dataclass(frozen=True)
class Ridge:
    """e W + b: weights [d, m], bias [m]. error: the root of the mean square error on prompts left out one by one."""

    weights: Floats64
    bias: Floats64
    penalty: float
    error: float

    @classmethod
    def fit(cls, rows: Floats, targets: Floats64) -> tuple[Ridge, LeftOut]:
        """rows [n, d], targets [n, m]. The penalty is that with the least error on prompts left out one by one, which
        takes no fits of its own (see `left_out_residuals`). Of one prompt, its targets are all that is known: weights
        0. Time O(n d min(n, d) + penalties n d m)."""
        x = rows.astype(np.float64)
        if len(x) == 1:
            nothing = LeftOut(np.zeros(0, np.int64), np.zeros((0, targets.shape[1])))
            return cls(np.zeros((x.shape[1], targets.shape[1])), targets[0], PENALTIES[-1], 0.0), nothing
        errors = np.array([float((residual**2).mean()) for residual in left_out_residuals(x, targets, PENALTIES)])
        best = int(np.argmin(np.round(errors, 12)))
        (residual,) = left_out_residuals(x, targets, PENALTIES[best : best + 1])
        middle, centre = x.mean(axis=0), targets.mean(axis=0)
        left, strengths, right = np.linalg.svd(x - middle, full_matrices=False)
        shrunk = strengths / (strengths**2 + PENALTIES[best])
        weights = right.T @ (shrunk[:, None] * (left.T @ (targets - centre)))
        made = cls(weights, centre - middle @ weights, PENALTIES[best], float(np.sqrt(errors[best])))
        return made, LeftOut(np.arange(len(x)), targets - residual)

    def predict(self, rows: Floats) -> Floats64:
        found: Floats64 = rows.astype(np.float64) @ self.weights + self.bias
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"head.weights": self.weights, "head.bias": self.bias}

    def facts(self) -> dict[str, float]:
        return {"penalty": self.penalty, "left_out_error": self.error}

    @classmethod
    def restored(cls, tensors: Mapping[str, NDArray[Any]]) -> Ridge:
        return cls(tensors["head.weights"], tensors["head.bias"], float("nan"), float("nan"))


def left_out_residuals(rows: Floats64, targets: Floats64, penalties: Sequence[float]) -> Iterator[Floats64]:
    """Per penalty, [n, m]: each prompt's targets less what the fit without that prompt predicts.

    Of a linear smoother that is the residual divided by 1 - leverage (Allen 1974), the intercept included.
    """
    n = len(rows)
    left, strengths, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    centred = targets - targets.mean(axis=0)
    projected = left.T @ centred
    for penalty in penalties:
        kept = strengths**2 / (strengths**2 + penalty)
        leverage = (left**2) @ kept + 1 / n
        yield (centred - left @ (kept[:, None] * projected)) / np.maximum(1 - leverage, 1e-12)[:, None]


@dataclass(frozen=True)
class Mlp:
    """relu(e W1 + b1) W2 + b2. error: the root of the mean square error on the fifth of the prompts that was held out
    to choose the epoch; NaN where there were too few."""

    hidden: Floats64
    hidden_bias: Floats64
    out: Floats64
    out_bias: Floats64
    error: float
    epochs: int

    @classmethod
    def fit(cls, rows: Floats, targets: Floats64, *, width: int, epochs: int, seed: int) -> tuple[Mlp, LeftOut]:
        """Adam on the mean square error of standardised targets, by torch on the CPU. Of all epochs that with the least
        error on every fifth prompt of a shuffled order; below 20 prompts, the last. Time O(epochs n d width)."""
        import torch

        rng = np.random.default_rng(seed)
        order = rng.permutation(len(rows))
        held, kept = (order[::5], np.delete(order, np.s_[::5])) if len(rows) >= 20 else (order[:0], order)
        centre, scale = targets.mean(axis=0), targets.std(axis=0)
        scale[scale < 1e-9] = 1.0
        x, y = (torch.from_numpy(np.asarray(part, np.float32)) for part in (rows, (targets - centre) / scale))
        d, m = rows.shape[1], targets.shape[1]

        def drawn(*shape: int) -> torch.Tensor:
            limit = 1 / np.sqrt(shape[0])
            values = rng.uniform(-limit, limit, shape).astype(np.float32)
            return torch.from_numpy(values).requires_grad_()

        # Embeddings have length 1, so that their coordinates are small: scaled up, units start neither dead nor linear.
        spread = float(np.sqrt(d))
        parts = [drawn(d, width), torch.zeros(width, requires_grad=True), drawn(width, m)]
        parts.append(torch.zeros(m, requires_grad=True))

        def forward(given: torch.Tensor) -> torch.Tensor:
            return torch.relu(given @ parts[0] * spread + parts[1]) @ parts[2] + parts[3]

        optimiser = torch.optim.AdamW(parts, lr=3e-3, weight_decay=1e-2)
        best, best_error, best_epoch = [part.detach().clone() for part in parts], float("inf"), 0
        for epoch in range(1, epochs + 1):
            shuffled = rng.permutation(kept)
            for start in range(0, len(shuffled), 64):
                part = torch.from_numpy(shuffled[start : start + 64])
                loss = ((forward(x[part]) - y[part]) ** 2).mean()
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
            with torch.no_grad():
                error = float(((forward(x[held]) - y[held]) ** 2).mean()) if len(held) else -float(epoch)
            if error < best_error:
                best, best_error, best_epoch = [part.detach().clone() for part in parts], error, epoch
        hidden, hidden_bias, out, out_bias = (part.numpy().astype(np.float64) for part in best)
        made = cls(hidden * spread, hidden_bias, out * scale, out_bias * scale + centre, float("nan"), best_epoch)
        predicted = made.predict(rows[held])
        error = float(np.sqrt(((predicted - targets[held]) ** 2).mean())) if len(held) else float("nan")
        return dataclasses.replace(made, error=error), LeftOut(held.astype(np.int64), predicted)

    def predict(self, rows: Floats) -> Floats64:
        inside = np.maximum(rows.astype(np.float64) @ self.hidden + self.hidden_bias, 0)
        found: Floats64 = inside @ self.out + self.out_bias
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        parts = {"hidden": self.hidden, "hidden_bias": self.hidden_bias, "out": self.out, "out_bias": self.out_bias}
        return {f"head.{name}": part for name, part in parts.items()}

    def facts(self) -> dict[str, float | None]:
        return {"epochs": self.epochs, "held_out_error": None if np.isnan(self.error) else self.error}

    @classmethod
    def restored(cls, tensors: Mapping[str, NDArray[Any]]) -> Mlp:
        hidden, hidden_bias, out, out_bias = (
            tensors[f"head.{name}"] for name in ("hidden", "hidden_bias", "out", "out_bias")
        )
        return cls(hidden, hidden_bias, out, out_bias, float("nan"), 0)
