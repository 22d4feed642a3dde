"""The curvature of linear layers as a product of two small matrices, and its damped inverse (EK-FAC).

A linear layer with inputs x and output gradients delta has the gradient G = sum_t delta_t x_t^T of a row. K-FAC takes
E[vec(G) vec(G)^T] for A (x) S with A = E[x x^T] and S = E[delta delta^T]. EK-FAC keeps their eigenvectors Q_A and Q_S
and measures the variance along each pair of them, Lam = E[(Q_S^T G Q_A)^2], so that

    (H + damp)^-1 V = Q_S [(Q_S^T V Q_A) / (Lam + damp)] Q_A^T.

Layers that read the same input (q, k and v of an attention) are one block: one layer whose outputs are stacked.
Biases take no part. Sources: Martens & Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884.
Imports torch; itself imported only once a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xpert.language_model import LanguageModel
from xpert.linear_capture import AnswerBatch, gradient_flow, row_losses
from xpert.lora_gradients import LayerStream

__all__ = [
    "DAMP_SHARE",
    "BlockCurvature",
    "BlockStream",
    "blocks_of",
    "eigenvectors",
    "row_gradients",
    "score_layers",
    "squared_projections",
    "streamed_products",
]

DAMP_SHARE = 0.1
"""Of the mean eigenvalue: the damping where none is chosen (the habit of DataInf and kronfluence)."""
_SHARING = ("q_proj", "k_proj", "v_proj")


def blocks_of(layers: Mapping[str, nn.Linear]) -> dict[str, tuple[str, ...]]:
    """Block name -> its layers, in the order in which their outputs are stacked."""
    found: dict[str, tuple[str, ...]] = {}
    for name in layers:
        parent, _, last = name.rpartition(".")
        if last not in _SHARING:
            found[name] = (name,)
            continue
        members = tuple(f"{parent}.{one}" for one in _SHARING if f"{parent}.{one}" in layers)
        found[f"{parent}.{'+'.join(member.rpartition('.')[2] for member in members)}"] = members
    return found


class BlockStream(LayerStream):
    """A LayerStream of blocks: `take(block, x [b, t, d_in], delta [b, t, d_out])`, the members' deltas stacked."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        blocks: Mapping[str, Sequence[str]],
        take: Callable[[str, Tensor, Tensor], None],
    ) -> None:
        super().__init__(layers, self._collect)
        self._blocks = {name: tuple(members) for name, members in blocks.items()}
        self._block_of = {member: name for name, members in self._blocks.items() for member in members}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._take_block = take

    def _collect(self, name: str, x: Tensor, delta: Tensor) -> None:
        block = self._block_of[name]
        there = self._waiting.setdefault(block, {})
        there[name] = delta
        members = self._blocks[block]
        if len(there) == len(members):
            del self._waiting[block]
            self._take_block(block, x, delta if len(members) == 1 else torch.cat([there[m] for m in members], dim=-1))


def row_gradients(x: Tensor, delta: Tensor) -> Tensor:
    """float32 [b, d_out, d_in]: each row's gradient of the layer, from x [b, t, d_in] and delta [b, t, d_out]."""
    return torch.bmm(delta.transpose(1, 2), x).float()


def streamed_products(x: Tensor, delta: Tensor, targets: Tensor) -> Tensor:
    """float32 [b, G]: the products <V_g, G_i> of targets V [G, d_out, d_in] with each row's gradient of the layer.

    One target: sum_t delta_t^T V x_t, and no row's gradient is ever formed. Several: each row's gradient is formed
    once, for that layer alone, which needs fewer multiplications than to go through the positions G times.
    """
    if len(targets) > 1:
        return row_gradients(x, delta).flatten(1) @ targets.float().flatten(1).T
    moved = (delta.flatten(0, 1) @ targets[0]).view_as(x)
    return (moved * x).sum((1, 2), dtype=torch.float32).view(-1, 1)


def eigenvectors(covariance: Tensor) -> Tensor:
    """Columns [d, d] float32 of a symmetric matrix; found in float64, since eigenvalues span many magnitudes."""
    _, vectors = torch.linalg.eigh(covariance.double())
    found: Tensor = vectors.float()
    return found


def squared_projections(x: Tensor, delta: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """float32 [d_out, d_in]: the sum over rows of (Q_S^T G Q_A)^2."""
    return row_gradients(x.float() @ q_a, delta.float() @ q_s).square_().sum(0)


@dataclass(frozen=True)
class BlockCurvature:
    """q_a [d_in, d_in], q_s [d_out, d_out] (eigenvectors in columns) and lam [d_out, d_in], all float32."""

    q_a: Tensor
    q_s: Tensor
    lam: Tensor

    def damping(self, damp: float | None) -> float:
        """The number itself; None: a tenth of the mean eigenvalue."""
        return DAMP_SHARE * float(self.lam.mean()) if damp is None else damp

    def inverse(self, v: Tensor, damp: float | None = None) -> Tensor:
        """(H + damp)^-1 V for V [..., d_out, d_in]. A block along which no row has a gradient gives 0.

        Time O(d_out d_in (d_out + d_in)) a matrix.
        """
        added = self.damping(damp)
        if added <= 0:
            return torch.zeros_like(v)
        rotated = self.q_s.T @ v @ self.q_a
        return self.q_s @ (rotated / (self.lam + added)) @ self.q_a.T


def score_layers(
    lm: LanguageModel,
    batch: AnswerBatch,
    layers: Mapping[str, nn.Linear],
    targets: Mapping[str, Tensor],
    *,
    norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [b], scores [b, G], norms [b]) float32 of a batch: sum over layers of <V_g, G_i>, and |G_i| if asked.

    `targets` by layer [G, d_out, d_in]. Norms that are not asked for are 0.
    """
    groups = len(next(iter(targets.values())))
    scores = torch.zeros(len(batch.labels), groups, dtype=torch.float32, device=lm.device)
    squares = torch.zeros(len(batch.labels), dtype=torch.float32, device=lm.device)

    def take(name: str, x: Tensor, delta: Tensor) -> None:
        if not norms:
            scores.add_(streamed_products(x, delta, targets[name]))
            return
        gradients = row_gradients(x, delta).flatten(1)
        scores.add_(gradients @ targets[name].flatten(1).T)
        squares.add_(gradients.square_().sum(1))

    with LayerStream(layers, take), gradient_flow(lm.model):
        losses = row_losses(lm.model, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach(), scores, squares.sqrt_()
