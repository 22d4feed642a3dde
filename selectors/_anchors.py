"""How near the pool's rows are to the shots: what the anchored selectors share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.budgeting import BudgetMeter
from xpert.errors import BadInput
from xpert.records import Shots
from xpert.selection import check_answers

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["BLOCK", "describe_shot", "fitting", "nearest_shots", "needs_shots", "similarities"]

Floats = NDArray[np.float32]

BLOCK = 4096
"""Pool rows handled at once; results do not depend on it."""


def needs_shots(method: str, shots: Shots | None, *, answers: bool = False) -> Shots:
    """The shots; raises BadInput where a method that needs them was given none, or reads answers and one has none."""
    if shots is None or len(shots) == 0:
        raise BadInput(f"method {method!r} needs shots", hint="give the examples of the task by --shots FILE")
    if answers:
        check_answers(method, shots)
    return shots


def similarities(embeddings: Floats, anchors: Floats, *, block: int = BLOCK) -> Floats:
    """Cosines [n, K] float32 of unit rows [n, d] with unit anchors [K, d]; time O(n K d), memory O(n K).

    Rounded to six decimals, so that equal rows tie (and the lowest index wins) whatever the order of the sums was.
    """
    result = np.empty((len(embeddings), len(anchors)), dtype=np.float32)
    for start in range(0, len(embeddings), block):
        result[start : start + block] = embeddings[start : start + block] @ anchors.T
    return np.round(result, 6, out=result)


def nearest_shots(features: Features, *, block: int = BLOCK) -> tuple[Floats, NDArray[np.int64]]:
    """The greatest cosine [n] of each pool row with any shot, and that shot's index [n] (ties: the first)."""
    cosines = similarities(features.embeddings(), features.shot_embeddings(), block=block)
    nearest = cosines.argmax(axis=1)
    return np.take_along_axis(cosines, nearest[:, None], axis=1)[:, 0], nearest


def describe_shot(shots: Shots) -> Callable[[int, float], str]:
    """A reason's words: (shot index, cosine) -> `cosine 0.83 to shot 3 (How many apples...)`."""
    heads = []
    for row in shots:
        words = " ".join(row.prompt.split())
        heads.append(words if len(words) <= 40 else words[:37].rstrip() + "...")

    def describe(shot: int, cosine: float) -> str:
        return f"cosine {cosine:.3f} to shot {shot + 1} ({heads[shot]})"

    return describe


def fitting(meter: BudgetMeter, rows: int) -> NDArray[np.bool_]:
    """Which rows [n] fit what is left of the budget."""
    return np.ones(rows, dtype=bool) if meter.costs is None else meter.costs <= meter.left
