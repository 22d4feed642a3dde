"""For each query the shots most similar to it, the nearest one next to the question (kNN prompting)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.overlap import same_text_key
from xpert.protocols import Exemplars, ExemplarTask

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class NearestOptions(Config):
    last: str = option(
        "nearest",
        "the exemplar next to the question: the nearest of them or the farthest",
        choices=("nearest", "farthest"),
    )


class Nearest:
    """The `count` shots with the greatest cosine to the query, by the embedder of the features; ties: the first shot.

    shots [K, d], queries [m, d], unit rows -> one list per query. Score: mean cosine of its exemplars. A shot that asks
    the very same text as the query (but for case, spaces and punctuation at the ends) is passed over, since its answer
    would be the query's own.
    """

    Options: ClassVar[type[Config]] = NearestOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings", "queries"})
    cost: ClassVar[str] = "time O(m K d), memory O(m K)"
    source: ClassVar[str] = "Liu et al. 2022 (KATE), What Makes Good In-Context Examples for GPT-3?, arXiv:2101.06804"

    def __init__(self, options: NearestOptions) -> None:
        self.options = options

    def order(self, task: ExemplarTask, count: int, rng: np.random.Generator) -> list[Exemplars]:
        embeddings = task.features.embeddings()
        # Rounded, so that equal rows tie whatever the order of the sums was.
        cosines = np.round(task.features.embed(task.queries) @ embeddings.T, 6)
        asked = [same_text_key(shot.prompt) for shot in task.shots]
        lists = []
        for index, query in enumerate(task.queries):
            own = same_text_key(query.prompt)
            others = np.array([row for row, text in enumerate(asked) if text != own], dtype=np.int64)
            if len(others) < count:
                raise BadInput(
                    f"{count} exemplars are asked for, but only {len(others)} shots ask something else than query "
                    f"{query.id}",
                    hint="lower --count, or leave that query out",
                )
            rows = others[np.argsort(-cosines[index, others], kind="stable")[:count]]
            rows = rows[::-1] if self.options.last == "nearest" else rows
            near = cosines[index, rows]
            reasons = [f"cosine {value:.3f} to the query" for value in near]
            lists.append(Exemplars(rows, reasons, float(near.mean()), index))
        return lists


PLUGIN = Nearest
