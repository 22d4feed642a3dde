"""Rows whose gradients point where the shots' do: how much a training step on a row would help the shots (LESS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.gradients import ExactScores, GradientOptions, GradientPass, gradient_dtype
from xpert.influence.grouping import shot_groups
from xpert.influence.stored import kept_folder
from xpert.protocols import Floats, RowPass
from xpert.records import Shots
from xpert.selectors._anchors import needs_shots
from xpert.selectors._influence import warmed_up
from xpert.selectors.scorers._answer_scores import NO_ROOM

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

_BLOCK = 8192


@dataclass(frozen=True)
class LessOptions(Config):
    """The settings of the released code are in brackets where they differ."""

    warmup: float = option(
        0.05, "share of the pool that the adapter is trained on first; 0: none", minimum=0, maximum=1
    )
    epochs: int = option(4, "passes over these rows; each leaves a checkpoint", minimum=1)
    ckpts: str = option("all", "checkpoints at which gradients are taken", choices=("all", "last"))
    form: str = option("adam", "a row's gradient as Adam would use it, or plain", choices=("adam", "plain"))
    group: str = option("skill", "column by which shots are grouped: a row counts by its best group; none: one group")
    sketch_dim: int = option(8192, "numbers kept of a gradient; 0: exact scores, which hold for these shots", minimum=0)
    sketch: str = option("fold", "how gradients are shortened to them", choices=("fold", "countsketch"))
    rank: int = option(8, "rank of the adapter [128]", minimum=1)
    alpha: int = option(16, "scale of the adapter; its updates are multiplied by alpha / rank [512]", minimum=1)
    layers: tuple[str, ...] = option(
        ("attention",), "layers that are adapted: attention, mlp, all, or names such as q_proj,v_proj"
    )
    learning_rate: float = option(2e-4, "highest learning rate of the warm-up [2e-5]", minimum=0)
    batch_size: int = option(16, "rows per step of the warm-up [128]", minimum=1)
    dtype: str = option(
        "auto",
        "of the base while gradients are taken; auto is bfloat16 where the device multiplies in it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "adam" and self.warmup == 0:
            raise BadInput("form is adam, but warmup is 0: without training Adam has no moments", hint="use form=plain")


class Less:
    """Cosine of a row's gradient with the gradients of the shots, on a LoRA adapter that is warming up.

    An adapter is trained on a random share of the pool (drawn by content, at least one batch). At the checkpoint of
    each epoch, rows are taken as Adam would use their gradients and shots as they are; both are brought to unit
    length, which keeps short answers from winning. score(z) = max over groups of the mean over the group's shots of
    sum_i w_i <Gamma_i(z), g_i(shot)>, with the checkpoints' mean learning rates as weights w (they sum to 1).
    Shots without a value in the column `skill` are one group. Not scored: rows whose prompt leaves no room.
    """

    Options: ClassVar[type[Config]] = LessOptions
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "answers", "base"})
    cost: ClassVar[str] = "a warm-up training, then a forward and a backward pass of the base per row and checkpoint"
    source: ClassVar[str] = "LESS: Xia et al. 2024, arXiv:2402.04333"

    def __init__(self, options: LessOptions) -> None:
        self.options = options
        self._known: dict[int, tuple[float, int]] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options = self.options
        given = needs_shots("less", shots, answers=True)
        self._features = features
        self._names, groups = shot_groups(given, options.group)
        found = warmed_up(features, options, kept_folder(features.folder, self))
        checkpoints = tuple(found if options.ckpts == "all" else found[-1:])
        rates = np.array([checkpoint.learning_rate for checkpoint in checkpoints])
        self._weights = rates / rates.sum() if rates.sum() else np.full(len(rates), 1 / len(rates))
        base, limit = features.base(), features.options.max_length
        dtype = gradient_dtype(options.dtype, features.device)
        if options.sketch_dim == 0:
            self._pass: RowPass = ExactScores(base, checkpoints, given.rows, groups, options.form, limit, dtype)
            return
        settings = GradientOptions(options.sketch_dim, options.sketch, limit, dtype)
        self._pass = GradientPass(base, checkpoints, settings, options.form)
        kept = features.compute_shots(GradientPass(base, checkpoints, settings))["gradient"].astype(np.float32)
        self._targets = _group_means(kept, np.array(groups), self._names)

    def score(self, rows: NDArray[np.int64]) -> Floats:
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _BLOCK):
            part = rows[start : start + _BLOCK]
            found = self._features.compute(self._pass, part)
            each = found["scores"] if self.options.sketch_dim == 0 else self._cosines(found["gradient"])
            by_group = np.einsum("c,ncg->ng", self._weights, each)
            best = by_group.argmax(axis=1)
            scores[start : start + _BLOCK] = by_group[np.arange(len(part)), best]
            values = zip(scores[start : start + _BLOCK].tolist(), best.tolist(), strict=True)
            self._known.update(zip(part.tolist(), values, strict=True))
        return scores

    def explain(self, row: int) -> str:
        score, group = self._known[row]
        if not np.isfinite(score):
            return NO_ROOM
        return f"gradient cosine {score:.3f}" + (f" with {self._names[group]}" if len(self._names) > 1 else "")

    def _cosines(self, kept: NDArray[np.float16]) -> Floats:
        """[n, C, D] of unit length -> mean cosines [n, C, G] with each group."""
        return np.stack(
            [kept[:, number].astype(np.float32) @ targets.T for number, targets in enumerate(self._targets)], axis=1
        )


def _group_means(kept: Floats, groups: NDArray[np.int64], names: Sequence[str]) -> list[Floats]:
    """Unit gradients [K, C, D] of the shots -> per checkpoint the groups' means [G, D]; shots without room left out."""
    readable = np.isfinite(kept).all(axis=(1, 2))
    for number, name in enumerate(names):
        if not (readable & (groups == number)).any():
            raise BadInput(
                f"no shot of {name} has room for its answer", hint="raise --max-length, or give shorter shots"
            )
    means = np.stack([kept[readable & (groups == number)].mean(axis=0) for number in range(len(names))])
    return [np.ascontiguousarray(means[:, number]) for number in range(means.shape[1])]


PLUGIN = Less
