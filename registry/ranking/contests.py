"""Contests of two: who beat whom how often, out of scores or out of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.ranking.points import Scores, as_array

__all__ = ["Contests", "contests_of", "read_contests", "task_wins"]

RESULTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
FORMS = '{"winner": ..., "loser": ...} or {"a": ..., "b": ..., "result": "a", "b" or "tie"}'


@dataclass(frozen=True)
class Contests:
    """Kinds of outcome: system `first[k]` met `second[k]` and took the share `share[k]` (1, 0, or 0.5 for a tie),
    `count[k]` times. Systems are sorted by name."""

    systems: tuple[str, ...]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    share: NDArray[np.float64]
    count: NDArray[np.int64]

    def wins(self, count: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """[n, n]: how often a beat b, ties as half; with other counts of the outcomes if given."""
        n = len(self.systems)
        times = self.count if count is None else count
        found = np.zeros(n * n)
        found += np.bincount(self.first * n + self.second, times * self.share, n * n)
        found += np.bincount(self.second * n + self.first, times * (1 - self.share), n * n)
        return found.reshape(n, n)


def task_wins(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """scores [..., n] -> [..., n, n]: 1 where a scores above b, 0.5 where they are equal; the diagonal is 0."""
    above = (array[..., :, None] > array[..., None, :]).astype(np.float64)
    equal = (array[..., :, None] == array[..., None, :]) & ~np.eye(array.shape[-1], dtype=bool)
    found: NDArray[np.float64] = above + 0.5 * equal
    return found


def contests_of(scores: Scores) -> Contests:
    """Every task is one contest of each two systems that have a score there, won by the higher one.

    All tasks weigh alike, whatever their number of items: a task is one voice, as it is for Borda and Kemeny. Contests
    of one task are not independent of each other, so errors from the model are too small; resample tasks instead.
    """
    systems, array = as_array(scores)
    kinds: Counter[tuple[int, int, float]] = Counter()
    for task in task_wins(array):
        for first, second in zip(*np.nonzero(np.triu(task + task.T, 1)), strict=True):
            kinds[int(first), int(second), float(task[first, second])] += 1
    return _contests(systems, kinds)


def read_contests(path: Path) -> Contests:
    """Contests out of rows {"winner", "loser"} or {"a", "b", "result": "a" | "b" | "tie"}, one contest a row.

    Other fields are not read. Raises BadInput with the line for a row of another form, and for a file without rows.
    """
    from xpert.readers import open_source

    source = open_source(path)
    kinds: Counter[tuple[str, str, float]] = Counter()
    for block in source.blocks():
        for position, (line, value) in enumerate(zip(block.lines, block.values, strict=True)):
            try:
                if block.faults.get(position):
                    raise ValueError(block.faults[position])
                kinds[_outcome(value)] += 1
            except ValueError as reason:
                hint = f"a row is {FORMS}"
                raise BadInput(f"line {line} {reason}", where=source.where, hint=hint) from None
    if not kinds:
        raise BadInput("holds no contest", where=source.where, hint=f"a row is {FORMS}")
    systems = sorted({system for first, second, _ in kinds for system in (first, second)})
    place = {system: number for number, system in enumerate(systems)}
    return _contests(systems, {(place[a], place[b], share): times for (a, b, share), times in kinds.items()})


def _outcome(value: Any) -> tuple[str, str, float]:
    if not isinstance(value, Mapping):
        raise ValueError("is no object")
    if value.get("winner") is not None and value.get("loser") is not None:
        first, second, share = value["winner"], value["loser"], 1.0
    elif value.get("a") is not None and value.get("b") is not None:
        result = value.get("result")
        if not isinstance(result, str) or result not in RESULTS:
            raise ValueError(f"has the result {result!r}")
        first, second, share = value["a"], value["b"], RESULTS[result]
    else:
        raise ValueError("names no two systems")
    if not isinstance(first, str) or not isinstance(second, str) or not first or not second:
        raise ValueError("names a system by something that is not text")
    if first == second:
        raise ValueError(f"lets {first} meet itself")
    return first, second, share


def _contests(systems: list[str], kinds: Mapping[tuple[int, int, float], int]) -> Contests:
    first, second, share = zip(*kinds, strict=True) if kinds else ((), (), ())
    return Contests(
        tuple(systems),
        np.array(first, dtype=np.int64),
        np.array(second, dtype=np.int64),
        np.array(share, dtype=np.float64),
        np.array(list(kinds.values()), dtype=np.int64),
    )
