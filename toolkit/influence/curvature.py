"""Measuring the EK-FAC curvature of a base model on rows, and the gradients of target rows.

The curvature is that of the mean answer loss over rows like those of the POOL: target rows alone, which are few,
would leave most directions with no curvature at all. Imports torch; itself imported only once a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from xpert.answer_losses import refuse_nan
from xpert.array_cache import Arrays
from xpert.errors import BadInput
from xpert.influence.grouping import mean_weights
from xpert.influence.kronecker import (
    BlockCurvature,
    BlockStream,
    blocks_of,
    eigenvectors,
    squared_projections,
)
from xpert.language_model import LanguageModel
from xpert.linear_capture import AnswerBatch, answer_logits, gradient_flow, linear_layers, row_losses
from xpert.lora_gradients import row_examples
from xpert.progress import SILENT, Progress
from xpert.records import Row

__all__ = ["BATCH_TOKENS", "block_curvature", "damped_targets", "group_gradients", "measure_curvature"]

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


def measure_curvature(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    layers: Sequence[str] = ("attention",),
    labels: str = "sampled",
    max_length: int = 1024,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Arrays:
    """`BLOCK.q_a`, `BLOCK.q_s` and `BLOCK.lam` of every block (see `kronecker.BlockCurvature`).

    labels: "sampled" draws each answer token from the model's own prediction, which gives the Gauss-Newton matrix of
    a row's mean loss; "given" takes the rows' answers (the empirical Fisher matrix of their gradients). A and S are
    over all positions that the loss reaches, prompts among them: taken over answer positions alone, the rank
    correlation with the exact inverse is lower. Lam is of whole rows. Two forward and backward passes a row, and an
    eigendecomposition of each factor; memory O(sum over blocks of d_in^2 + d_out^2 + d_in d_out). Raises BadInput
    where no row has room for its answer, where a row's loss is no number, or where a layer is not there.
    """
    chosen = linear_layers(lm.model, layers)
    blocks = blocks_of(chosen)
    examples = row_examples(lm, rows, max_length, BATCH_TOKENS[lm.device.type])
    draws = _Draws(seed) if labels == "sampled" else None
    count = int(examples.readable.sum())
    if not count:
        raise BadInput(
            f"none of the {len(rows)} rows for the curvature has room for its answer in {max_length} tokens",
            hint="raise --max-length",
        )

    def run(take: Callable[[AnswerBatch, str, Tensor, Tensor], None], title: str) -> None:
        with progress.task(f"{title}, rows", count) as task:
            for indices, batch in examples.batches():

                def hand_on(name: str, x: Tensor, delta: Tensor, batch: AnswerBatch = batch) -> None:
                    take(batch, name, x, delta)

                with BlockStream(chosen, blocks, hand_on), gradient_flow(lm.model):
                    losses = _curvature_losses(lm, batch, None if draws is None else draws.of(indices, batch))
                    losses.sum().backward()  # type: ignore[no-untyped-call]
                values = losses.detach().cpu().numpy()
                refuse_nan(values, np.ones(len(indices), bool), [rows[index] for index in indices], "the loss")
                task.advance(len(indices))

    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(batch: AnswerBatch, name: str, x: Tensor, delta: Tensor) -> None:
        kept = (delta != 0).any(-1)
        x, delta = x[kept].float(), delta[kept].float()
        a, s = sums.get(name, (0.0, 0.0))
        sums[name] = (a + x.T @ x, s + delta.T @ delta)

    run(add, "covariances")
    bases = {name: (eigenvectors(a), eigenvectors(s)) for name, (a, s) in sums.items()}
    sums.clear()
    lam: dict[str, Tensor] = {}

    def project(batch: AnswerBatch, name: str, x: Tensor, delta: Tensor) -> None:
        lam[name] = lam.get(name, 0.0) + squared_projections(x, delta, *bases[name]) / count

    run(project, "eigenvalues")
    found: Arrays = {}
    for name, (q_a, q_s) in bases.items():
        for part, tensor in (("q_a", q_a), ("q_s", q_s), ("lam", lam[name])):
            found[f"{name}.{part}"] = tensor.cpu().numpy()
    return found


def block_curvature(arrays: Arrays, block: str, device: torch.device) -> BlockCurvature:
    """A block of what `measure_curvature` gave, on a device."""
    q_a, q_s, lam = (_tensor(arrays[f"{block}.{part}"], device) for part in ("q_a", "q_s", "lam"))
    return BlockCurvature(q_a, q_s, lam)


def group_gradients(
    lm: LanguageModel,
    rows: Sequence[Row],
    groups: Sequence[int],
    *,
    layers: Sequence[str] = ("attention",),
    max_length: int = 1024,
) -> dict[str, Tensor]:
    """Block -> float32 [G, d_out, d_in]: the mean gradient of the rows of each group, `groups` [K] numbering from 0.

    Rows without room for an answer are left out; raises BadInput where a group has no other.
    """
    chosen = linear_layers(lm.model, layers)
    blocks = blocks_of(chosen)
    examples = row_examples(lm, rows, max_length, BATCH_TOKENS[lm.device.type])
    weights = torch.from_numpy(mean_weights(groups, examples.readable, max_length)).to(lm.device)
    found: dict[str, Tensor] = {}
    for indices, batch in examples.batches():

        def add(name: str, x: Tensor, delta: Tensor, indices: NDArray[np.int64] = indices) -> None:
            x = x.float().flatten(0, 1)
            parts = [
                (delta.float() * own[:, None, None]).flatten(0, 1).T @ x for own in weights[torch.from_numpy(indices)].T
            ]
            found[name] = found.get(name, 0.0) + torch.stack(parts)

        with BlockStream(chosen, blocks, add), gradient_flow(lm.model):
            losses = row_losses(lm.model, batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        values = losses.detach().cpu().numpy()
        refuse_nan(values, np.ones(len(indices), bool), [rows[index] for index in indices], "the loss")
    return found


def _curvature_losses(lm: LanguageModel, batch: AnswerBatch, draws: Tensor | None) -> Tensor:
    """float32 [b]: losses whose gradients' second moments are the curvature; `draws` [m] in 0..1 choose the labels.

    With drawn labels the tokens' gradients are independent with mean 0, so the square of their sum over root T is, on
    average, the mean over T tokens of each one's curvature: the Gauss-Newton matrix of the row's mean loss.
    """
    if draws is None:
        return row_losses(lm.model, batch)
    logits, _, row = answer_logits(lm.model, batch)
    logits = logits.float()
    with torch.no_grad():
        heights = torch.softmax(logits, dim=-1).cumsum(-1)
        drawn = torch.searchsorted(heights, (draws * heights[:, -1])[:, None])[:, 0].clamp(max=logits.shape[1] - 1)
    losses = functional.cross_entropy(logits, drawn, reduction="none")
    sums = torch.zeros(len(batch.labels), dtype=torch.float32, device=losses.device).index_add(0, row, losses)
    return sums / batch.answer_tokens.clamp(min=1).sqrt()


class _Draws:
    """Numbers in 0..1 for the answer tokens of a row, by seed and row: neither batch nor device changes them.

    Both passes draw the same, so that no gradient of the second lies where the factors of the first know nothing and
    their eigenvectors are any.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of(self, indices: NDArray[np.int64], batch: AnswerBatch) -> Tensor:
        """float32 [m] of the batch's answer tokens, row after row."""
        counts = batch.answer_tokens.tolist()
        parts = [
            np.random.default_rng([self._seed, int(index)]).random(count, np.float32)
            for index, count in zip(indices, counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(batch.labels.device)


def _tensor(array: NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


def damped_targets(
    arrays: Arrays, gradients: Mapping[str, Tensor], damp: float | None, device: torch.device
) -> dict[str, Tensor]:
    """Block -> (H + damp)^-1 of its group gradients [G, d_out, d_in]."""
    return {name: block_curvature(arrays, name, device).inverse(v, damp) for name, v in gradients.items()}
