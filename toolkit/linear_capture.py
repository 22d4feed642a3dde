"""One forward and one backward pass over a batch of rows, and what the linear layers saw in it.

The loss of row i is the mean negative log-likelihood of its answer tokens. The rows of a batch do not touch one
another, so the gradient of the summed losses with respect to a layer's output holds row i's own in its i-th entry: a
weight W [d_out, d_in] has the per-row gradient sum over t of delta[i, t] x[i, t]^T, where x are the layer's inputs and
delta the gradients of its outputs. Imports torch; itself imported only once a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from xpert.chat_form import encode_examples
from xpert.errors import BadInput, unknown
from xpert.records import Row

__all__ = [
    "AnswerBatch",
    "LinearCapture",
    "answer_logits",
    "encode_rows",
    "gradient_flow",
    "length_batches",
    "linear_layers",
    "make_batch",
    "row_losses",
]

IGNORED = -100
LAYERS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value", "dense"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
"""Names that the linear layers of public causal models go by."""


@dataclass(frozen=True)
class AnswerBatch:
    """Rows of ids, padded on the right: input_ids, attention_mask and labels (-100 off the answers), int64 [b, t]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def supervised(self) -> Tensor:
        """bool [b, t]: the positions whose next token is an answer's."""
        wanted = torch.zeros_like(self.labels, dtype=torch.bool)
        wanted[:, :-1] = self.labels[:, 1:] != IGNORED
        return wanted

    @property
    def answer_tokens(self) -> Tensor:
        """int64 [b]"""
        return self.supervised.sum(1)


def encode_rows(tokenizer: Any, rows: Sequence[Row], max_length: int) -> list[tuple[tuple[int, ...], int]]:
    """(ids, answer start) per row, cut to `max_length`; nothing of the answer is left where start >= len(ids)."""
    return encode_examples(tokenizer, rows, max_length)


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Indices of rows of like length, longest first, at most `tokens` padded tokens a batch (one row at least)."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def make_batch(examples: Sequence[tuple[Sequence[int], int]], device: torch.device, pad: int = 0) -> AnswerBatch:
    """(ids, answer start) pairs as tensors."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    # A first token has nothing before it that could predict it.
    labels[:, 0] = IGNORED
    return AnswerBatch(ids.to(device), mask.to(device), labels.to(device))


def answer_logits(model: Any, batch: AnswerBatch, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [m, v], targets [m], row [m]) of the batch's m answer tokens.

    The output head sees the positions before answer tokens only: over a large vocabulary the others, which no loss
    reads, would cost more than several layers.
    """
    wanted = batch.supervised
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][wanted].unsqueeze(0), *given[1:]))
    try:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **arguments)
    finally:
        hook.remove()
    targets = batch.labels[:, 1:][wanted[:, :-1]]
    # A view: indexing would cost a pass over all logits on the way back.
    return output.logits.squeeze(0), targets, wanted.nonzero()[:, 0]


def row_losses(model: Any, batch: AnswerBatch, **arguments: Any) -> Tensor:
    """float32 [b]: the mean negative log-likelihood of each row's answer tokens; 0 where it has none."""
    logits, targets, row = answer_logits(model, batch, **arguments)
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(len(batch.labels), dtype=torch.float32, device=losses.device).index_add(0, row, losses)
    return sums / batch.answer_tokens.clamp(min=1)


def linear_layers(model: Any, choice: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of a model by full name: `attention`, `mlp`, `all` (without the output head), or by last names.

    Raises BadInput where a name is not there, or a choice finds none; it tells which names there are.
    """
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    there = sorted({name.rsplit(".", 1)[-1] for name in linears})
    wanted = [choice] if isinstance(choice, str) else list(choice)
    if wanted == ["all"]:
        chosen = set(there)
    elif len(wanted) == 1 and wanted[0] in LAYERS:
        chosen = set(LAYERS[wanted[0]]) & set(there)
    else:
        for name in wanted:
            if name not in there:
                raise unknown("layer", name, there, where="the base model")
        chosen = set(wanted)
    found = {name: linear for name, linear in linears.items() if name.rsplit(".", 1)[-1] in chosen}
    if not found:
        raise BadInput(
            f"the base model has no linear layers of the kind {' '.join(wanted)!r}",
            hint=f"name some of those it has: {', '.join(there) or 'none'}",
        )
    return found


class LinearCapture:
    """While it is entered, a model's forward and backward passes leave the layers' inputs and output gradients here.

        with LinearCapture(layers) as seen, gradient_flow(model):
            row_losses(model, batch).sum().backward()
        seen.inputs[name], seen.output_gradients[name]      # [b, t, d_in], [b, t, d_out]

    The hooks are gone when it is left, also by an exception. Entries are of the last pass.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = dict(layers)
        self.inputs: dict[str, Tensor] = {}
        self.output_gradients: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._on_forward(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def clear(self) -> None:
        self.inputs.clear()
        self.output_gradients.clear()

    def _on_forward(self, name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name] = given[0].detach()
            if output.requires_grad:
                output.register_hook(partial(self._on_backward, name))  # type: ignore[no-untyped-call]

        return keep

    def _on_backward(self, name: str, gradient: Tensor) -> None:
        self.output_gradients[name] = gradient.detach()


@contextmanager
def gradient_flow(model: Any) -> Iterator[None]:
    """Lets gradients flow through a model whose parameters are frozen meanwhile, so that none is kept for them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
