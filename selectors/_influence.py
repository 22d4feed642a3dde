"""What the influence scorers share: rows of the pool drawn by content, an adapter warmed up on some, and that a row
counts by its best group of shots, whatever the pass that scores it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from xpert.lora_training import Checkpoint, LoraOptions, warm_up
from xpert.protocols import Floats, RowPass
from xpert.records import Row
from xpert.selectors.scorers._answer_scores import NO_ROOM
from xpert.storage import hash_texts

if TYPE_CHECKING:
    from xpert.data import Pool
    from xpert.features import Features

__all__ = ["GroupScores", "warm_up_rows", "warmed_up"]


class WarmUp(Protocol):
    """The options of a scorer that say how its adapter is warmed up."""

    @property
    def warmup(self) -> float: ...
    @property
    def epochs(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...


def warmed_up(features: Features, options: WarmUp, folder: Path) -> list[Checkpoint]:
    """The checkpoints of an adapter trained on a share of the pool, one batch at least; on nothing where it is 0."""
    pool, count = features.pool, 0
    if options.warmup:
        count = min(len(pool), max(round(options.warmup * len(pool)), options.batch_size))
    settings = LoraOptions(
        rank=options.rank,
        alpha=options.alpha,
        layers=options.layers,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_length=features.options.max_length,
    )
    return warm_up(
        features.base(),
        warm_up_rows(pool, count, features.seed),
        settings,
        folder,
        device=features.device,
        seed=features.seed,
        progress=features.progress,
    )


def warm_up_rows(pool: Pool, count: int, seed: int) -> list[Row]:
    """`count` rows of a pool at random, in random order, by seed and content: the pool's order does not matter."""
    if not count:
        return []
    start = f"{seed}:"
    texts = zip(pool.prompts(), pool.responses(), strict=True)
    marks = [hashlib.sha256((start + hash_texts(pair)).encode()).digest() for pair in texts]
    return pool.rows(sorted(range(len(marks)), key=lambda row: marks[row])[:count])


class GroupScores:
    """Scores of rows by a pass with arrays `scores` [G] a row and, to `normalise` by it, `norm`."""

    def __init__(self, features: Features, row_pass: RowPass, names: Sequence[str], *, normalise: bool) -> None:
        self.row_pass = row_pass
        self._features = features
        self._names = names
        self._normalise = normalise
        self._known: dict[int, tuple[float, int]] = {}

    def score(self, rows: NDArray[np.int64]) -> Floats:
        """float32 [m]: each row's greatest score with any group; NaN where its prompt leaves no room for an answer."""
        found = self._features.compute(self.row_pass, rows)
        each = np.array(found["scores"], np.float32)
        if self._normalise:
            each /= np.maximum(found["norm"], np.finfo(np.float32).tiny)[:, None]
        best = each.argmax(axis=1)
        scores = np.asarray(each[np.arange(len(rows)), best], np.float32)
        self._known.update(zip(rows.tolist(), zip(scores.tolist(), best.tolist(), strict=True), strict=True))
        return scores

    def explain(self, row: int) -> str:
        score, group = self._known[row]
        if not np.isfinite(score):
            return NO_ROOM
        return f"influence {score:.3g}" + (f" on {self._names[group]}" if len(self._names) > 1 else "")
