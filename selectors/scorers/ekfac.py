"""Rows whose learning would lower the shots' loss, by second-order influence with EK-FAC curvature (Quad)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.gradients import gradient_dtype
from xpert.influence.ekfac import CurvatureOptions, EkfacScores, ekfac_targets
from xpert.influence.grouping import shot_groups
from xpert.influence.stored import kept_folder
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors._anchors import needs_shots
from xpert.selectors._influence import GroupScores, warm_up_rows

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class EkfacOptions(Config):
    """The setting of the paper is in brackets where it differs."""

    layers: tuple[str, ...] = option(
        ("attention",), "layers whose gradients count: attention, mlp, all, or names such as q_proj,down_proj"
    )
    factor_rows: int = option(256, "rows of the pool, drawn by content, that the curvature is measured on", minimum=1)
    labels: str = option(
        "sampled",
        "answers that the curvature is measured with: drawn from the model (Gauss-Newton), or those given",
        choices=("sampled", "given"),
    )
    damp: float | None = option(
        None, "added to every eigenvalue; none: a tenth of their mean, by layer [0.001]", minimum=0
    )
    normalise: bool = option(False, "divide by the length of the row's gradient, which short answers have longer")
    group: str = option("skill", "column by which shots are grouped: a row counts by its best group; none: one group")
    dtype: str = option(
        "auto",
        "of the base while rows are scored; auto is bfloat16 where the device multiplies in it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp == 0:
            raise BadInput("damp is 0, and an eigenvalue of 0 has no inverse", hint="use a small number, or none")


class Ekfac:
    """How much the shots' loss would fall for a small step on a row: <(H + damp)^-1 grad L(shots), grad L(row)>.

    H is the curvature of the base model's linear layers, a Kronecker product by layer with corrected eigenvalues,
    measured on rows of the pool. score(z) = max over groups of shots; higher helps. Mean losses give short answers
    long gradients: normalise=true takes that away. Shots without a value in the column `skill` are one group; where
    there are several, each group's direction has unit length. Not scored: rows whose prompt leaves no room.
    """

    Options: ClassVar[type[Config]] = EkfacOptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "answers", "base"})
    cost: ClassVar[str] = (
        "two forward and backward passes per row the curvature is measured on, kept; then one per row scored"
    )
    source: ClassVar[str] = (
        "Quad: Zhang et al. 2024, arXiv:2409.16986; EK-FAC influence: Grosse et al. 2023, arXiv:2308.03296"
    )

    def __init__(self, options: EkfacOptions) -> None:
        self.options = options

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options, base, limit = self.options, features.base(), features.options.max_length
        given = needs_shots("ekfac", shots, answers=True)
        names, groups = shot_groups(given, options.group)
        settings = CurvatureOptions(options.layers, options.labels, options.damp, limit, features.seed)
        count = min(options.factor_rows, len(features.pool))
        targets = ekfac_targets(
            base,
            warm_up_rows(features.pool, count, features.seed),
            given.rows,
            groups,
            settings,
            kept_folder(features.folder, self),
            device=features.device,
            progress=features.progress,
        )
        dtype = gradient_dtype(options.dtype, features.device)
        row_pass = EkfacScores(base, targets, options.normalise, limit, dtype)
        self._groups = GroupScores(features, row_pass, names, normalise=options.normalise)

    def score(self, rows: NDArray[np.int64]) -> Floats:
        return self._groups.score(rows)

    def explain(self, row: int) -> str:
        return self._groups.explain(row)


PLUGIN = Ekfac
