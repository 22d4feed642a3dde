"""The mean of a base model's last hidden states over each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.answer_losses import AnswerLosses, context_limit
from xpert.protocols import RowWorker
from xpert.records import Row

__all__ = ["MeanStates"]

_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class MeanStates:
    """A pass: `state` float32 [d], the mean over all tokens of prompt and answer, read as in training.

    Rows are cut at their end to `max_length` tokens. Cost: one forward pass a row, without the output head.
    """

    base: str
    max_length: int = 1024
    dtype: str = "auto"
    name: ClassVar[str] = "mean-states"
    shard_rows: ClassVar[int] = 256

    @property
    def key(self) -> Mapping[str, Any]:
        return AnswerLosses(self.base, self.max_length, self.dtype).key

    def open(self, device: str) -> RowWorker:
        from xpert.language_model import encode_examples, load_model

        lm = load_model(self.base, device=device, dtype=self.dtype)
        limit = context_limit(lm, self.max_length)
        body = lm.model.base_model

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            import torch

            from xpert.linear_capture import length_batches, make_batch

            examples = encode_examples(lm.tokenizer, rows, limit)
            states = np.empty((len(rows), lm.model.config.get_text_config().hidden_size), np.float32)
            with torch.inference_mode():
                for part in length_batches([len(ids) for ids, _ in examples], _BATCH_TOKENS):
                    batch = make_batch([examples[index] for index in part], lm.device)
                    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                    hidden = body(**given, use_cache=False).last_hidden_state.float()
                    weight = batch.attention_mask[..., None].float()
                    states[part] = ((hidden * weight).sum(1) / weight.sum(1)).cpu().numpy()
            return {"state": states}

        return work
