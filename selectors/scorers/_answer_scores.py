"""What the scorers share that read one number of each answer from one pass of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.answer_losses import AnswerLosses
from xpert.protocols import Floats

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["NO_ROOM", "AnswerValues"]

NO_ROOM = "its prompt leaves no room for the answer"


class AnswerValues:
    """One field of AnswerLosses for the rows asked for; remembers what it read, and how many rows were cut.

    All such scorers share the pass, so that one forward pass a row serves them all.
    """

    def __init__(self, features: Features, field: str) -> None:
        self._features, self._field = features, field
        self._pass = AnswerLosses(features.base(), features.options.max_length)
        self._known: dict[int, float] = {}
        self._cut: set[int] = set()

    def read(self, rows: NDArray[np.int64]) -> Floats:
        """float32 [m]; NaN where a prompt leaves no room for its answer."""
        if not len(rows):
            return np.empty(0, np.float32)
        arrays = self._features.compute(self._pass, rows)
        values = np.asarray(arrays[self._field], np.float32)
        self._known.update(zip(rows.tolist(), values.tolist(), strict=True))
        self._cut.update(rows[np.asarray(arrays["cut"], bool)].tolist())
        return values

    def __getitem__(self, row: int) -> float:
        return self._known[row]

    def explain(self, row: int, name: str) -> str:
        value = self._known[row]
        return f"{name} {value:.4g}" if np.isfinite(value) else NO_ROOM

    def log(self) -> list[Mapping[str, Any]]:
        """How many of the rows read were longer than the context and cut at their end."""
        limit = self._features.options.max_length
        return [{"step": "context", "rows": len(self._known), "longer": len(self._cut), "tokens": limit}]
