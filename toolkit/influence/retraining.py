"""Training on subsets of rows, and what it does to the loss of target rows: the truth a score is checked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.array_cache import ArrayCache
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.lora_training import AdapterState, LoraOptions, train_adapter
from xpert.progress import SILENT, Progress
from xpert.records import Row
from xpert.storage import hash_texts

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["RetrainingOptions", "Trainer", "draw_subsets", "target_losses"]

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class RetrainingOptions(Config):
    """The small adapter that is trained on every subset, from the same start and for as many steps."""

    steps: int = option(16, "optimizer steps of each training", minimum=1)
    batch_size: int = option(8, "rows per step", minimum=1)
    learning_rate: float = option(1e-3, "highest learning rate of AdamW", minimum=0)
    rank: int = option(8, "rank of the adapter", minimum=1)
    alpha: int = option(16, "scale of the adapter; its updates are multiplied by alpha / rank", minimum=1)
    layers: tuple[str, ...] = option(
        ("attention",), "layers that are adapted: attention, mlp, all, or names such as q_proj,v_proj"
    )

    def lora(self, max_length: int) -> LoraOptions:
        """One pass over as many rows as the steps take; float32, as what is compared are small differences."""
        return LoraOptions(
            rank=self.rank,
            alpha=self.alpha,
            layers=self.layers,
            dropout=0.0,
            learning_rate=self.learning_rate,
            epochs=1,
            batch_size=self.batch_size,
            max_length=max_length,
            dtype="float32",
        )


def draw_subsets(rows: int, share: float, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[count, rows]: random subsets of one size, no two the same. Raises BadInput where there are not so many."""
    size = round(share * rows)
    if not 0 < size < rows or comb(rows, size) < count:
        raise BadInput(
            f"a share of {share:g} of {rows} rows is {size}, and of such subsets there are not {count} different ones",
            hint="take more rows, or another share",
        )
    found: dict[bytes, NDArray[np.bool_]] = {}
    while len(found) < count:
        member = np.zeros(rows, bool)
        member[rng.permutation(rows)[:size]] = True
        found.setdefault(member.tobytes(), member)
    return np.stack(list(found.values()))


class Trainer:
    """Trains on subsets and measures the targets' losses; a result that is stored is read, and no model is loaded."""

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        identity: str,
        targets: Sequence[Row],
        options: RetrainingOptions,
        max_length: int,
        cache: ArrayCache,
    ) -> None:
        self._load = load
        self._identity = identity
        self._targets = targets
        self._options = options
        self._max_length = max_length
        self._cache = cache
        self._lm: LanguageModel | None = None
        self._start: AdapterState | None = None

    @property
    def lm(self) -> LanguageModel:
        if self._lm is None:
            self._lm = self._load()
        return self._lm

    def losses(self, rows: Sequence[Row], seed: int, progress: Progress = SILENT) -> NDArray[np.float32]:
        """float32 [K]: the targets' losses after training on `rows`; without rows, before any training.

        `seed` orders the rows. Each is seen as often as any other, give or take once. Raises BadInput where a loss is
        no number.
        """
        key = {
            "model": self._identity,
            "rows": hash_texts(text for row in rows for text in (row.prompt, row.response)),
            "targets": hash_texts(text for row in self._targets for text in (row.prompt, row.response)),
            "options": self._options.to_dict(),
            "max_length": self._max_length,
            "seed": seed,
            "form": 1,
        }
        found = self._cache.get_or_make("influence-check", key, lambda: {"losses": self._train(rows, seed, progress)})
        return np.asarray(found["losses"])

    def _train(self, rows: Sequence[Row], seed: int, progress: Progress) -> NDArray[np.float32]:
        settings = self._options.lora(self._max_length)
        if self._start is None:
            [self._start] = train_adapter(self.lm, [], settings)
        if not rows:
            return target_losses(self.lm, self._start, self._targets, self._max_length)
        wanted = self._options.steps * self._options.batch_size
        rng = np.random.default_rng([seed, 1])
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-wanted // len(rows)))])[:wanted]
        shown = [rows[index] for index in order]
        [state] = train_adapter(self.lm, shown, settings, start=self._start, seed=seed, progress=progress)
        return target_losses(self.lm, state, self._targets, self._max_length)


def target_losses(
    lm: LanguageModel, state: AdapterState, targets: Sequence[Row], max_length: int
) -> NDArray[np.float32]:
    """float32 [K]: the mean answer loss of each target with an adapter.

    Raises BadInput where a target's prompt leaves no room for its answer, or its loss is no number.
    """
    import torch

    from xpert.answer_losses import refuse_nan
    from xpert.linear_capture import linear_layers, row_losses
    from xpert.lora_gradients import merged, place_factors, row_examples

    examples = row_examples(lm, targets, max_length, _BATCH_TOKENS)
    if not examples.readable.all():
        lacking = targets[int(np.flatnonzero(~examples.readable)[0])].id
        raise BadInput(
            f"target {lacking} has no room for its answer in {max_length} tokens",
            hint="raise --max-length, or leave it out",
        )
    found = np.zeros(len(targets), np.float32)
    factors: dict[str, Any] = place_factors(lm.model, state, lm.device)
    with merged(linear_layers(lm.model, "all"), factors), torch.inference_mode():
        for indices, batch in examples.batches():
            found[indices] = row_losses(lm.model, batch).cpu().numpy()
    refuse_nan(found, np.ones(len(targets), bool), targets, "the loss after training")
    return found
