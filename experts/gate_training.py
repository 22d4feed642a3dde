"""What token gates know a finished expert by: vectors trained beside it, or states measured in it.

Base and expert are frozen. Tensor code; imported only once a model is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xpert.answer_losses import refuse_nan
from xpert.errors import BadInput
from xpert.experts.adapters import LowRank
from xpert.experts.gate_options import GateOptions
from xpert.progress import SILENT, Progress
from xpert.protocols import LowRankUpdate
from xpert.records import Row

__all__ = ["Example", "average_activations", "expert_applied", "peft_updates", "train_phatgoose"]

Example = tuple[Sequence[int], int]
"""(token ids, where the answer starts)."""

_BATCH_TOKENS = 4096


def train_phatgoose(
    model: Any,
    updates: Mapping[str, LowRankUpdate],
    examples: Sequence[Example],
    rows: Sequence[Row],
    options: GateOptions,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains one vector per adapted module: y = W x + sigmoid(v . x) B A x, everything but v frozen, v from 0.

    model: a causal language model in evaluation mode; updates: module name -> a [r, in], b [out, r] with the scale.
    examples and the rows they are of, in the same order. The loss of a step is the mean over the answer tokens of its
    rows; the learning rate rises over the first `warmup` of the steps and falls linearly to 0. Gives the vectors,
    float32 [in] by module, and figures. Deterministic by seed. The model is left as it was. Raises BadInput where no
    row has room for its answer, or a row's loss is no number. Source: Muqeeth et al. 2024, arXiv:2402.05859.
    """
    readable = [index for index, (ids, first) in enumerate(examples) if max(first, 1) < len(ids)]
    if not readable:
        raise BadInput(f"none of the {len(examples):,} rows has room for its answer", hint="raise --max-length")
    examples, rows = [examples[i] for i in readable], [rows[i] for i in readable]
    devices = {name: update.a.device for name, update in updates.items()}
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        vectors = {
            name: torch.zeros(update.a.shape[1], device=devices[name], requires_grad=True)
            for name, update in updates.items()
        }
        optimizer = torch.optim.AdamW(vectors.values(), weight_decay=options.weight_decay)
        losses, tokens = [], 0
        with (
            expert_applied(model, updates, vectors),
            progress.task(f"phatgoose vectors on {len(rows):,} rows, steps", options.steps) as task,
        ):
            for step, indices in zip(range(options.steps), _batches(len(rows), options.batch_size, seed), strict=False):
                rate = options.learning_rate * _course(step, options.steps, options.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                tokens += sum(len(examples[i][0]) for i in indices)
                losses.append(_backward(model, [examples[i] for i in indices], [rows[i] for i in indices]))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                task.advance(1, f"loss {losses[-1]:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    course = {"first_loss": losses[0], "final_loss": float(np.mean(tail))}
    figures = {"rows": len(rows), "steps": len(losses), "tokens": tokens, **course}
    return {name: vector.detach() for name, vector in vectors.items()}, figures


def average_activations(
    model: Any, updates: Mapping[str, LowRankUpdate], examples: Sequence[Example], count: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mean of each adapted module's input at the last prompt token of the first `count` examples, the expert on.

    Gives float32 [in] by module, and figures. An example whose answer starts at its first token has no prompt and is
    passed over; raises BadInput where all are so. Cost: one forward pass over those prompts. Source: mttl, the
    baseline of Ostapenko et al. 2024, arXiv:2405.11157.
    """
    from xpert.linear_capture import length_batches, make_batch

    prompts = [tuple(ids[:start]) for ids, start in examples if start > 0][:count]
    if not prompts:
        raise BadInput("no row has a prompt, whose last token would be measured")
    sums = {name: torch.zeros(update.a.shape[1], device=update.a.device) for name, update in updates.items()}
    with torch.inference_mode():
        for indices in length_batches([len(ids) for ids in prompts], _BATCH_TOKENS):
            chosen = [prompts[i] for i in indices]
            batch = make_batch([(ids, len(ids)) for ids in chosen], _device(model))
            last = torch.tensor([len(ids) - 1 for ids in chosen], device=batch.input_ids.device)
            with expert_applied(model, updates, seen=_adding(sums, last)):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    figures = {"prompts": len(prompts), "tokens": sum(map(len, prompts))}
    return {name: total.clone() / len(prompts) for name, total in sums.items()}, figures


@contextmanager
def expert_applied(
    model: Any,
    updates: Mapping[str, LowRankUpdate],
    vectors: Mapping[str, Tensor] | None = None,
    *,
    seen: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """While it is entered, the model adds an expert's updates, times sigmoid(v . x) where there are vectors.

    `seen` is called with each adapted module's name and input. Hooks are gone when it is left, also by an exception.
    """
    hooks = []
    try:
        for name, update in updates.items():
            hook = _adds(name, update, None if vectors is None else vectors[name], seen)
            hooks.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def peft_updates(model: Any, dtype: torch.dtype) -> dict[str, LowRank]:
    """The active adapter of a peft model, as `read_adapter` would read it once it is saved."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        for adapter in getattr(layer, "active_adapters", ()) if hasattr(layer, "lora_A") else ():
            a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            found[name] = LowRank(a.to(dtype), (b.float() * layer.scaling[adapter]).to(dtype))
    return found


def _adds(
    name: str, update: LowRankUpdate, vector: Tensor | None, seen: Callable[[str, Tensor], None] | None
) -> Callable[..., Tensor]:
    def hook(_: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0]
        if seen is not None:
            seen(name, x)
        added = (x.to(update.a.dtype) @ update.a.T) @ update.b.T
        if vector is not None:
            added = added * torch.sigmoid(x.float() @ vector).unsqueeze(-1)
        return output + added.to(output.dtype)

    return hook


def _adding(sums: Mapping[str, Tensor], last: Tensor) -> Callable[[str, Tensor], None]:
    row = torch.arange(len(last), device=last.device)

    def seen(name: str, x: Tensor) -> None:
        if x.ndim != 3 or len(x) != len(last):
            raise BadInput(
                f"{name} gets {list(x.shape)} for {len(last)} rows, so the state of a token cannot be told in it",
                hint="train the expert without that module among target_modules",
            )
        sums[name].add_(x[row, last].float().sum(0))

    return seen


def _backward(model: Any, examples: Sequence[Example], rows: Sequence[Row]) -> float:
    """Adds the gradients of the mean loss over the answer tokens, in passes of like length; gives that loss."""
    from xpert.linear_capture import length_batches, make_batch, row_losses

    tokens = sum(len(ids) - max(first, 1) for ids, first in examples)
    total = 0.0
    for part in length_batches([len(ids) for ids, _ in examples], _BATCH_TOKENS):
        batch = make_batch([examples[i] for i in part], _device(model))
        losses = row_losses(model, batch)
        refuse_nan(losses.detach().cpu().numpy(), np.ones(len(part), bool), [rows[i] for i in part], "the loss")
        share = (losses * batch.answer_tokens).sum() / tokens
        share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    return total


def _batches(rows: int, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of one batch after another, without end; in each epoch every row once, in another order."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        for begin in range(0, rows, size):
            yield order[begin : begin + size]


def _course(step: int, steps: int, rise: float) -> float:
    """The share of the highest learning rate at a step: up over the first, down to 0 after the last."""
    rising = int(np.ceil(rise * steps))
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / (steps - rising)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device
