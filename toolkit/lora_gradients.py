"""Gradients of every row with respect to a LoRA adapter, from one backward pass of the plain base model per batch.

The adapter is merged into the weights, W + s B A, so the pass costs no more than the base alone. A layer's inputs x
and output gradients delta then give each row's own gradients as low-rank products,

    dA = s sum_t (B^T delta_t) x_t^T        [r, d_in]
    dB = s sum_t delta_t (A x_t)^T          [d_out, r]

without the weight's gradient [d_out, d_in] ever being formed. They are taken layer by layer while the backward pass
runs, so that neither all deltas nor a whole gradient [b, P] need be held. Activations and the products' operands have
the model's dtype; sums inside a product, the gradients, their norms and all that is made of them are float32. In
bfloat16 the merged weights are rounded up or down at random, by seed: rounded to the nearest, an adapter that moves a
weight by less than half its last bit would be lost.
Imports torch; itself imported only once a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xpert.answer_losses import context_limit, refuse_nan
from xpert.errors import BadInput
from xpert.language_model import LanguageModel, encode_examples
from xpert.linear_capture import (
    AnswerBatch,
    LinearCapture,
    answer_logits,
    length_batches,
    linear_layers,
    make_batch,
)
from xpert.lora_training import AdapterState
from xpert.records import Row

__all__ = [
    "AdamForm",
    "Factors",
    "LayerStream",
    "RowExamples",
    "check_finite",
    "merged",
    "outer_products",
    "place_factors",
    "row_examples",
    "stream_gradients",
    "weight_norms",
]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Factors:
    """The factors of a layer's adapter, on the model's device: a [r, d_in], b [d_out, r] float32, and their scale."""

    a: Tensor
    b: Tensor
    scale: float


def place_factors(model: object, state: AdapterState, device: torch.device) -> dict[str, Factors]:
    """The factors by layer. Raises BadInput where the model has no such layer, or one of another shape."""
    layers = linear_layers(model, "all")
    found = {}
    for name in state.layers:
        a, b = state.weights[f"{name}.lora_A"], state.weights[f"{name}.lora_B"]
        if name not in layers or layers[name].weight.shape != (b.shape[0], a.shape[1]):
            raise BadInput(f"the adapter's layer {name} does not fit the base model", hint="use the base it is for")
        found[name] = Factors(a.to(device), b.to(device), state.scale)
    return found


def outer_products(x: Tensor, delta: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """(dA [b, r, d_in], dB [b, d_out, r]) float32 of inputs x [b, t, d_in] and output gradients delta [b, t, d_out]."""
    rows, tokens, rank = len(x), x.shape[1], len(factors.a)

    def narrow(factor: Tensor, wide: Tensor) -> Tensor:
        """[r, d] and [b, t, d] -> [b, r, t]. Narrow matrices stand on the left of every product: BLAS is slow else."""
        scaled = (factor * factors.scale).to(wide.dtype)
        return (scaled @ wide.reshape(rows * tokens, -1).T).view(rank, rows, tokens).transpose(0, 1)

    grad_a = torch.bmm(narrow(factors.b.T, delta), x)
    grad_b = torch.bmm(narrow(factors.a, x), delta).transpose(1, 2)
    return grad_a.float(), grad_b.float()


@contextmanager
def merged(layers: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> Iterator[None]:
    """While it is entered the layers' weights hold W + s B A; afterwards, also after an exception, W itself again.

    The parameters are exchanged and not changed, so they come back bit for bit. Memory: the adapted weights twice.
    """
    kept = {name: layers[name].weight for name in factors}
    try:
        with torch.no_grad():
            for name, one in factors.items():
                whole = torch.addmm(kept[name].float(), one.b, one.a, alpha=one.scale)
                layers[name].weight = nn.Parameter(_rounded(whole, kept[name].dtype, name), requires_grad=False)
        yield
    finally:
        for name, weight in kept.items():
            layers[name].weight = weight


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """float32 as another dtype; to bfloat16 up or down with the odds that keep the mean, seeded by the layer's name."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # bfloat16 is the upper half of a float32: what is added to the lower half carries into it or is cut off.
    bits = values.view(torch.int32).add_(_noise(values, name)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _noise(like: Tensor, name: str) -> Tensor:
    """int32 of 0..65535 by position: the same on every device, unlike a generator's. The mixing is MurmurHash3's."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little", signed=True)
    bits = torch.arange(like.numel(), device=like.device, dtype=torch.int64).to(torch.int32).view_as(like)
    bits.bitwise_xor_(seed)
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return bits.bitwise_and_((1 << 16) - 1)


class LayerStream(LinearCapture):
    """A capture that hands each layer's (name, inputs, output gradients) on during the backward pass, keeping none.

    Gradients begin at the outputs of the layers: what lies before the first of them is not differentiated.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], take: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__(layers)
        self._take = take

    def _on_forward(self, name: str) -> Any:
        keep = super()._on_forward(name)

        def begin(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if output.dim() != 3:
                raise BadInput(
                    f"layer {name} does not read rows apart (as the experts of a mixture), so they have no gradients",
                    hint="name other layers, such as attention",
                )
            if not output.requires_grad:
                output.requires_grad_(True)
            keep(module, given, output)

        return begin

    def _on_backward(self, name: str, gradient: Tensor) -> None:
        with torch.no_grad():
            self._take(name, self.inputs.pop(name), gradient.detach())


class AdamForm:
    """What Adam would make of a gradient: Gamma = m' / sqrt(v' + eps), as LESS takes it.

    m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2; eps stands inside the root and there is no correction of the
    bias. Moments are found by parameter name. Raises ValueError where a parameter has none.
    Source: Xia et al. 2024, arXiv:2402.04333.
    """

    def __init__(self, state: AdapterState, device: torch.device) -> None:
        missing = set(state.weights) - (set(state.first) & set(state.second))
        if missing:
            raise ValueError(f"no moments for {min(missing)}")
        self._first = {name: (tensor.to(device) * BETAS[0]).flatten() for name, tensor in state.first.items()}
        self._second = {
            name: (tensor.to(device) * BETAS[1] + EPSILON).flatten() for name, tensor in state.second.items()
        }

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """[b, size] float32 -> the same shape."""
        first = torch.add(self._first[name], gradient, alpha=1 - BETAS[0])
        second = torch.addcmul(self._second[name], gradient, gradient, value=1 - BETAS[1])
        return first.mul_(second.rsqrt_())


def stream_gradients(
    lm: LanguageModel,
    batch: AnswerBatch,
    layers: Mapping[str, nn.Linear],
    factors: Mapping[str, Factors],
    take: Callable[[str, Tensor], None],
) -> Tensor:
    """Losses float32 [b] of a batch; `take` gets (parameter name, gradients [b, size] float32), layer by layer.

    The adapter must be merged. Order: as the backward pass reaches the layers, from the last to the first.
    """

    def hand_on(name: str, x: Tensor, delta: Tensor) -> None:
        grad_a, grad_b = outer_products(x, delta, factors[name])
        take(f"{name}.lora_A", grad_a.flatten(1))
        take(f"{name}.lora_B", grad_b.flatten(1))

    return _backward(lm, batch, LayerStream({name: layers[name] for name in factors}, hand_on))


def _backward(lm: LanguageModel, batch: AnswerBatch, stream: LayerStream) -> Tensor:
    """Losses float32 [b] of a batch, after a backward pass that the stream has seen."""
    trainable = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with stream, torch.enable_grad():
            logits, targets, row = answer_logits(lm.model, batch)
            each = _TokenLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
            losses = torch.zeros(len(batch.labels), device=each.device).index_add(0, row, each)
            losses = losses / batch.answer_tokens.clamp(min=1)
            losses.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return losses.detach()


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy float32 [m] of logits [m, v] that holds one such array instead of three, in half the passes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses = -log_p.gather(1, targets[:, None])[:, 0]
        error = log_p.exp_()
        error[torch.arange(len(targets), device=error.device), targets] -= 1
        ctx.save_for_backward(error)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (error,) = ctx.saved_tensors
        return error.mul_(grad[:, None]).to(ctx.dtype), None


@dataclass(frozen=True)
class RowExamples:
    """Rows as a model reads them: `batches` are (indices of rows, batch); `cut` [m] tells which were too long.

    `readable` [m]: rows whose answer has a token left within the limit; the others are in no batch.
    """

    batches: Callable[[], Iterator[tuple[NDArray[np.int64], AnswerBatch]]]
    readable: NDArray[np.bool_]
    cut: NDArray[np.bool_]


def row_examples(lm: LanguageModel, rows: Sequence[Row], max_length: int, batch_tokens: int) -> RowExamples:
    """Rows in batches of like length, cut at their end by the context's limit."""
    limit = context_limit(lm, max_length)
    whole = encode_examples(lm.tokenizer, rows)
    examples = [(ids[:limit], start) for ids, start in whole]
    readable = np.array([max(start, 1) < len(ids) for ids, start in examples], bool)
    indices = np.flatnonzero(readable)

    def batches() -> Iterator[tuple[NDArray[np.int64], AnswerBatch]]:
        for part in length_batches([len(examples[index][0]) for index in indices], batch_tokens):
            chosen = indices[part]
            yield chosen, make_batch([examples[index] for index in chosen], lm.device)

    return RowExamples(batches, readable, np.array([len(ids) > limit for ids, _ in whole], bool))


def weight_norms(lm: LanguageModel, layers: Mapping[str, nn.Linear], batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """(losses, norms) float32 [b]: the length of each row's gradient with respect to the layers' whole weights.

    |sum_t delta_t x_t^T|^2 = sum over t, t' of (delta_t . delta_t') (x_t . x_t'), or by the product itself where rows
    are long and layers narrow: whichever needs fewer multiplications. Source of the first: Goodfellow 2015,
    arXiv:1510.01799.
    """
    squares = torch.zeros(len(batch.labels), dtype=torch.float32, device=lm.device)

    def take(name: str, x: Tensor, delta: Tensor) -> None:
        x, delta = x.float(), delta.float()
        tokens, d_in, d_out = x.shape[1], x.shape[2], delta.shape[2]
        if tokens * (d_in + d_out) < d_in * d_out:
            products = torch.bmm(x, x.transpose(1, 2)).mul_(torch.bmm(delta, delta.transpose(1, 2)))
            squares.add_(products.sum((1, 2)))
        else:
            squares.add_(torch.bmm(delta.transpose(1, 2), x).square_().sum((1, 2)))

    losses = _backward(lm, batch, LayerStream(layers, take))
    return losses, squares.clamp_(min=0).sqrt_()


def check_finite(
    losses: NDArray[np.float32], norms: NDArray[np.float32], rows: Sequence[Row], indices: NDArray[np.int64]
) -> None:
    """Raises BadInput naming the rows of a batch whose loss or gradient is no number."""
    order = np.argsort(indices)
    named = [rows[index] for index in indices[order]]
    every = np.ones(len(named), bool)
    refuse_nan(losses[order], every, named, "the loss")
    refuse_nan(norms[order], every, named, "the gradient")
