"""What the searches over ordered lists share: drawing lists, scoring each once, and the record of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.progress import Task
from xpert.protocols import Exemplars, ExemplarTask, ListScore

__all__ = ["Ordered", "SearchOptions", "Searched", "draw_lists"]

Ordered = tuple[int, ...]
"""Shot indices in the order of the prompt."""


@dataclass(frozen=True)
class SearchOptions(Config):
    reward: str = option(
        "likelihood",
        "what is sought: the greatest mean log-likelihood of the queries' answers (likelihood), or the share of them "
        "that greedy decoding gives token by token (accuracy), which ties often and stops the search at 1",
        choices=("likelihood", "accuracy"),
    )
    rounds: int = option(30, "how many lists are scored in all", minimum=1)


class Searched:
    """The lists scored so far, in order, with the best of them; the first one wins a tie."""

    def __init__(self, task: ExemplarTask, options: SearchOptions, progress: Task) -> None:
        assert task.score is not None
        self.task, self.score, self.options, self.progress = task, task.score, options, progress
        self.lists: list[Ordered] = []
        self.scores: list[ListScore] = []
        self.log: list[dict[str, Any]] = []
        self.best = 0

    def add(self, rows: Ordered, by: str, more: Mapping[str, float] | None = None) -> None:
        """Scores a list. `by` tells what proposed it; `more` goes into the log."""
        found = self.score(rows)
        self.lists.append(rows)
        self.scores.append(found)
        if self.reward(found) > self.reward(self.scores[self.best]):
            self.best = len(self.lists) - 1
        best = self.reward(self.scores[self.best])
        self.log.append(
            {
                "round": len(self.lists),
                "by": by,
                "shots": [self.task.shots.rows[row].id for row in rows],
                "log_likelihood": round(found.log_likelihood, 6),
                "accuracy": round(found.accuracy, 6),
                "best": round(best, 6),
                **{name: round(value, 6) for name, value in (more or {}).items()},
            }
        )
        self.progress.advance(1, f"best {best:.4f}")

    def reward(self, found: ListScore) -> float:
        return found.accuracy if self.options.reward == "accuracy" else found.log_likelihood

    def unit_rewards(self) -> NDArray[np.float64]:
        """Rewards in [0, 1]: accuracies, or geometric means of an answer token's probability, e^log-likelihood."""
        values = np.array([self.reward(found) for found in self.scores])
        return values if self.options.reward == "accuracy" else np.exp(values)

    @property
    def done(self) -> bool:
        """All rounds are spent, or nothing better can be found."""
        if not self.lists:
            return False
        perfect = self.options.reward == "accuracy" and self.scores[self.best].accuracy >= 1
        return len(self.lists) >= self.options.rounds or perfect

    def result(self) -> list[Exemplars]:
        best = self.reward(self.scores[self.best])
        reason = f"in the best of {len(self.lists)} lists, round {self.best + 1}: {self.options.reward} {best:.4f}"
        rows = np.array(self.lists[self.best], dtype=np.int64)
        return [Exemplars(rows, [reason] * len(rows), best, log=self.log)]


def draw_lists(shots: int, count: int, wanted: int, rng: np.random.Generator, seen: Sequence[Ordered]) -> list[Ordered]:
    """Up to `wanted` distinct ordered lists of `count` of `shots`, none of them in `seen`, each equally likely.

    Fewer only where fewer are left: then all of them, in a random order.
    """
    known = set(seen)
    if math.perm(shots, count) <= 4 * (wanted + len(known)):
        left = [rows for rows in itertools.permutations(range(shots), count) if rows not in known]
        return [left[place] for place in rng.permutation(len(left))[:wanted]]
    found: dict[Ordered, None] = {}
    while len(found) < wanted:
        keys = rng.random((wanted - len(found), shots))
        for rows in np.argsort(keys, axis=1)[:, :count].tolist():
            if tuple(rows) not in known:
                found[tuple(rows)] = None
    return list(found)
