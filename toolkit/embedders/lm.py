"""`lm`: the base model's own view of a text: its last hidden states, mean-pooled.

As in Cherry (Li et al. 2024, arXiv:2308.12032). States of a language model share one large common direction, so that
all cosines lie near 1; the pool's mean is taken off first, which `fit` learns (Mu and Viswanath 2018,
arXiv:1702.01417).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.embedders._pooling import mean_pooled
from xpert.embedding import normalise
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.protocols import EmbedderContext, Floats

__all__ = ["PLUGIN", "LanguageModelStates"]

_MOST_TOKENS = 512


class LanguageModelStates:
    """Cost: one forward pass of the base model over the pool (a GPU's work for more than some thousand rows)."""

    def __init__(self, context: EmbedderContext) -> None:
        if context.argument is not None:
            raise BadInput(
                "the embedder lm takes no argument", where=f"lm:{context.argument}", hint="name the model with --base"
            )
        if context.base is None:
            raise BadInput("the embedder lm needs a base model", hint="give it with --base MODEL")
        self._base = context.base
        self._device = context.device
        self._mean: Floats | None = None

    @cached_property
    def identity(self) -> str:
        from xpert.language_model import model_fingerprint

        return f"lm/1 {model_fingerprint(self._base)} tokens={_MOST_TOKENS}"

    def fit(self, texts: Sequence[str]) -> None:
        self.fit_embed(texts)

    def fit_embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        return self.settle(self._states(texts, progress))

    def raw(self, texts: Sequence[str]) -> Floats:
        return self._states(texts, SILENT)

    def settle(self, raw: Floats) -> Floats:
        self._mean = raw.mean(axis=0, dtype=np.float64).astype(np.float32)
        return self._centred(raw)

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        """Texts -> [n, d]; an empty text gives a zero row, and so does the only text of a pool of one."""
        if self._mean is None:
            raise RuntimeError("lm embeds only after fit")
        return self._centred(self._states(texts, progress))

    def state(self) -> dict[str, NDArray[Any]]:
        if self._mean is None:
            raise RuntimeError("lm has no state before fit")
        return {"mean": self._mean}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._mean = np.asarray(state["mean"])

    def _centred(self, raw: Floats) -> Floats:
        assert self._mean is not None
        centred = raw - self._mean
        centred[~raw.any(axis=1)] = 0
        # What is left of a row that equals the mean is rounding, not a direction.
        centred[np.linalg.norm(centred, axis=1) < 1e-4] = 0
        return normalise(centred)

    def _states(self, texts: Sequence[str], progress: Progress) -> Floats:
        lm = self._lm
        tokenizer = lm.tokenizer
        encoded = [
            ids
            for start in range(0, len(texts), 4096)
            for ids in tokenizer(
                list(texts[start : start + 4096]), add_special_tokens=False, truncation=True, max_length=_MOST_TOKENS
            )["input_ids"]
        ]
        body = lm.model.base_model  # without the head, whose logits would cost more than all layers of a small model
        return mean_pooled(
            encoded,
            lambda ids, mask: body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state,
            dimensions=lm.model.config.get_text_config().hidden_size,
            pad=tokenizer.pad_token_id or 0,
            device=lm.device,
            progress=progress,
            title="embedding (lm)",
        )

    @cached_property
    def _lm(self) -> Any:
        from xpert.language_model import load_model

        return load_model(self._base, device=self._device)


PLUGIN = LanguageModelStates
