"""The best of many random ordered lists of shots, by how well the base model answers the queries with each."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from xpert.config import Config
from xpert.exemplars._searching import Searched, SearchOptions, draw_lists
from xpert.protocols import Exemplars, ExemplarTask

__all__ = ["PLUGIN"]


class Search:
    """`rounds` distinct ordered lists drawn at random, or all there are where these are fewer; the best one is kept.

    A plain and strong control for `ease`. Ties: the list drawn first. Score: the reward of the best list, which is
    too good for unseen queries by as much as the best of many draws is lucky.
    """

    Options: ClassVar[type[Config]] = SearchOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base", "queries", "score"})
    cost: ClassVar[str] = "rounds passes of the base over count exemplars and all queries"
    source: ClassVar[str] = "random search, the best-of-n control of Wu et al. 2024 (EASE), arXiv:2405.16122"

    def __init__(self, options: SearchOptions) -> None:
        self.options = options

    def order(self, task: ExemplarTask, count: int, rng: np.random.Generator) -> list[Exemplars]:
        lists = draw_lists(len(task.shots), count, self.options.rounds, rng, ())
        with task.features.progress.task("scoring lists of exemplars", len(lists)) as progress:
            searched = Searched(task, self.options, progress)
            for rows in lists:
                searched.add(rows, "random")
                if searched.done:
                    break
        return searched.result()


PLUGIN = Search
