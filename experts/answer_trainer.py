"""trl's SFTTrainer on tokenised rows: batches of like length, the loss on answers alone, no silent NaN.

This module imports torch and trl; it is itself imported only once training begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

from xpert.errors import BadInput
from xpert.experts.training_data import Encoded

__all__ = ["AnswerTrainer", "LengthBatches", "Spent", "answer_loss", "to_dataset"]

IGNORED = -100


@dataclass
class Spent:
    """What training has used up so far: tokens seen (without padding), answer tokens, and seconds."""

    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0


def to_dataset(encoded: Encoded) -> Any:
    """A `datasets.Dataset` of input_ids and labels, the labels of prompt tokens being -100."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [list(ids) for ids, _ in encoded.examples],
            "labels": [[IGNORED] * start + list(ids[start:]) for ids, start in encoded.examples],
        }
    )


class LengthBatches(Sampler[int]):
    """Row indices in an order that makes batches of like length, another one each epoch.

    The order depends on the seed and the epoch alone, so that a resumed run meets the rows it has not met yet.
    Rows are shuffled, sorted by length within pools of 32 batches, and the batches shuffled; what does not fill a
    batch comes last.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        whole = len(order) - len(order) % self.batch
        batches: list[Any] = []
        for start in range(0, whole, 32 * self.batch):
            part = order[start : min(start + 32 * self.batch, whole)]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches.extend(part.reshape(-1, self.batch))
        for index in rng.permutation(len(batches)):
            yield from batches[index].tolist()
        yield from order[whole:].tolist()


def answer_loss(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(summed negative log-likelihood of the answer tokens, their number).

    The output head sees the positions before answer tokens only: over a vocabulary of tens of thousands the others,
    which no loss reads, would cost more than several layers.
    """
    labels = inputs["labels"]
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    head = getattr(model, "module", model).get_output_embeddings()  # the model itself, inside its DDP wrapper
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][wanted].unsqueeze(0), *given[1:]))
    try:
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**rest, use_cache=False).logits[0]
    finally:
        hook.remove()
    targets = labels[:, 1:][wanted[:, :-1]]
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), wanted.sum()


class AnswerTrainer(SFTTrainer):
    """SFTTrainer that counts what it spends, stops at a loss that is no number, and saves work on a CPU."""

    def __init__(self, *args: Any, lengths: Sequence[int], row_ids: Sequence[str], spent: Spent, **options: Any):
        self._lengths, self._row_ids, self.spent = lengths, row_ids, spent
        super().__init__(*args, **options)

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = math.ceil(len(self._lengths) / (self.args.train_batch_size * self.args.world_size))
        per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
        steps: int = math.ceil(per_epoch * self.args.num_train_epochs)
        return steps

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBatches:
        return LengthBatches(self._lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        training = bool(self.model.training)  # type: ignore[union-attr]
        if training:
            self._count(inputs)
        if self.args.device.type == "cpu" and not self.aux_loss_enabled and not return_outputs:
            # trl's fused head leaves out the prompt's positions on CUDA alone.
            loss, count = answer_loss(model, inputs)
            loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        else:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if training and not torch.isfinite(loss if not return_outputs else loss[0]):
            self._refuse(inputs)
        return loss

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Checkpoints need no card; the expert gets its own."""

    def _is_alone(self) -> bool:
        return bool(self.accelerator.num_processes == 1)

    def _count(self, inputs: dict[str, Any]) -> None:
        counts = torch.stack([inputs["attention_mask"].sum(), (inputs["labels"] != IGNORED).sum()])
        if not self._is_alone():
            counts = self.accelerator.reduce(counts)
        tokens, supervised = counts.tolist()
        self.spent.tokens += tokens
        self.spent.supervised += supervised

    def _refuse(self, inputs: dict[str, Any]) -> None:
        dataset: Any = self.train_dataset
        known = {tuple(ids): name for ids, name in zip(dataset["input_ids"], self._row_ids, strict=True)}
        lengths = inputs["attention_mask"].sum(1).tolist()
        sequences = [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        rows = ", ".join(known.get(tuple(ids), "?") for ids in sequences)
        raise BadInput(
            f"the loss is not a number at step {self.state.global_step + 1} (rows {rows})",
            hint=f"lower --learning-rate (it is {self.args.learning_rate:g}), or leave those rows out",
        )
