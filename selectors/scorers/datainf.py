"""Rows whose learning would lower the shots' loss, by DataInf's closed form on the gradients of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.gradients import gradient_dtype
from xpert.influence.datainf import DatainfScores, datainf_targets
from xpert.influence.grouping import shot_groups
from xpert.influence.stored import kept_folder
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors._anchors import needs_shots
from xpert.selectors._influence import GroupScores, warm_up_rows, warmed_up

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class DatainfOptions(Config):
    warmup: float = option(
        0.0,
        "share of the pool that the adapter is trained on first; 0: a random A alone, and gradients of B",
        minimum=0,
        maximum=1,
    )
    epochs: int = option(1, "passes of the warm-up over these rows", minimum=1)
    inverted_rows: int = option(256, "rows of the pool, drawn by content, whose gradients are inverted", minimum=1)
    normalise: bool = option(False, "divide by the length of the row's gradient, which short answers have longer")
    group: str = option("skill", "column by which shots are grouped: a row counts by its best group; none: one group")
    rank: int = option(8, "rank of the adapter", minimum=1)
    alpha: int = option(16, "scale of the adapter; its updates are multiplied by alpha / rank", minimum=1)
    layers: tuple[str, ...] = option(
        ("attention",), "layers that are adapted: attention, mlp, all, or names such as q_proj,v_proj"
    )
    learning_rate: float = option(2e-4, "highest learning rate of the warm-up", minimum=0)
    batch_size: int = option(16, "rows per step of the warm-up", minimum=1)
    dtype: str = option(
        "auto",
        "of the base while rows are scored; auto is bfloat16 where the device multiplies in it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )


class Datainf:
    """How much the shots' loss would fall for a small step on a row, under the mean of the rows' own inverses.

    Gradients are those of a LoRA adapter: a seeded random one, of which only B has any, or one trained on a share of
    the pool. score(z) = max over groups of shots of sum_l <h_l, grad_l L(z)>, h in closed form from `inverted_rows`
    rows of the pool; higher helps. Shots without a value in the column `skill` are one group; where there are
    several, each group's direction has unit length. Not scored: rows whose prompt leaves no room for the answer.
    """

    Options: ClassVar[type[Config]] = DatainfOptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "answers", "base"})
    cost: ClassVar[str] = "two forward and backward passes of the base per row inverted, kept; then one per row scored"
    source: ClassVar[str] = "DataInf: Kwon et al. 2024, arXiv:2310.00902"

    def __init__(self, options: DatainfOptions) -> None:
        self.options = options

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options, base, limit = self.options, features.base(), features.options.max_length
        given = needs_shots("datainf", shots, answers=True)
        names, groups = shot_groups(given, options.group)
        pool, folder = features.pool, kept_folder(features.folder, self)
        where: dict[str, Any] = {"device": features.device, "progress": features.progress}
        checkpoint = warmed_up(features, options, folder)[-1]
        rows = warm_up_rows(pool, min(options.inverted_rows, len(pool)), features.seed)
        targets = datainf_targets(base, checkpoint, rows, given.rows, groups, folder, max_length=limit, **where)
        row_pass = DatainfScores(base, checkpoint, targets, limit, gradient_dtype(options.dtype, features.device))
        self._groups = GroupScores(features, row_pass, names, normalise=options.normalise)

    def score(self, rows: NDArray[np.int64]) -> Floats:
        return self._groups.score(rows)

    def explain(self, row: int) -> str:
        return self._groups.explain(row)


PLUGIN = Datainf
