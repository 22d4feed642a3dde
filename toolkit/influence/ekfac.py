"""EK-FAC influence of rows on groups of target rows: the preconditioned targets, and the pass that scores rows.

influence(z, g) = <(H + damp)^-1 grad L(g), grad L(z)>: how much the loss of group g would fall for a small step that
lowers the loss of z. Higher helps. The targets being fixed, a row's score is a sum over its positions, delta^T V x:
no gradient of a row is kept and none is projected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.array_cache import ArrayCache, Arrays
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.influence.grouping import comparable
from xpert.influence.stored import StoredTargets
from xpert.progress import SILENT, Progress
from xpert.protocols import RowWorker
from xpert.records import Row
from xpert.storage import hash_json, hash_texts

if TYPE_CHECKING:
    import torch

__all__ = ["CurvatureOptions", "EkfacScores", "ekfac_targets"]


@dataclass(frozen=True)
class CurvatureOptions(Config):
    """What the curvature is measured of."""

    layers: tuple[str, ...] = option(
        ("attention",), "layers whose gradients count: attention, mlp, all, or names such as q_proj,down_proj"
    )
    labels: str = option(
        "sampled",
        "answers that the curvature is measured with: drawn from the model (Gauss-Newton), or those given",
        choices=("sampled", "given"),
    )
    damp: float | None = option(None, "added to every eigenvalue; none: a tenth of their mean, by layer", minimum=0)
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end", minimum=8)
    seed: int = option(0, "of the drawn answers", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp == 0:
            raise BadInput("damp is 0, and an eigenvalue of 0 has no inverse", hint="use a small number, or none")


def ekfac_targets(
    base: str,
    pool_rows: Sequence[Row],
    targets: Sequence[Row],
    groups: Sequence[int],
    options: CurvatureOptions,
    folder: Path,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> StoredTargets:
    """The preconditioned mean gradient of each of G groups of targets [K], by layer: float32 [G, d_out, d_in].

    The curvature, measured on `pool_rows`, is kept apart in `folder`: other targets find it there. Where there are
    several groups, each is brought to unit length, so that one with long gradients is not every row's best. Raises
    BadInput as `measure_curvature` and `group_gradients` do.
    """
    from xpert.language_model import model_fingerprint, resolve_device

    settings = options.to_dict()
    damp = settings.pop("damp")
    curvature_key = {
        "base": model_fingerprint(base),
        "rows": _texts(pool_rows),
        "device": resolve_device(device).type,
        **settings,
        "form": 1,
    }
    key = {"curvature": hash_json(curvature_key), "targets": _texts(targets), "groups": list(groups), "damp": damp}

    def make() -> Arrays:
        from xpert.influence.curvature import damped_targets, group_gradients, measure_curvature
        from xpert.influence.kronecker import blocks_of
        from xpert.language_model import load_model
        from xpert.linear_capture import linear_layers

        lm = load_model(base, device=device, dtype="float32")
        shared: dict[str, Any] = {"layers": options.layers, "max_length": options.max_length}
        gradients = group_gradients(lm, targets, groups, **shared)
        more: dict[str, Any] = {"labels": options.labels, "seed": options.seed, "progress": progress, **shared}
        curvature = ArrayCache(folder, progress).get_or_make(
            "curvature", curvature_key, lambda: measure_curvature(lm, pool_rows, **more)
        )
        damped = damped_targets(curvature, gradients, damp, lm.device)
        return _by_layer(comparable(damped), blocks_of(linear_layers(lm.model, options.layers)), lm.model)

    return StoredTargets.make(folder, key, make, progress)


@dataclass(frozen=True)
class EkfacScores:
    """A pass: the influence of each row on each of G groups of targets.

    Arrays per row: `scores` [G] float32, `cut`, whether the row was longer than `max_length`, and with `norms` also
    `norm`, the length of the row's gradient over the same layers. NaN where a prompt leaves no room for its answer.
    Raises BadInput naming a row whose loss or gradient is no number. Cost: one forward and one backward pass a row,
    and for each layer as many multiplications as its forward pass has (with several groups or `norms` those of its
    weight's gradient); memory 4 G P bytes for P weights of the layers.
    """

    base: str
    targets: StoredTargets
    norms: bool = False
    max_length: int = 1024
    dtype: str = "float32"
    name: ClassVar[str] = "ekfac-scores"
    shard_rows: ClassVar[int] = 64

    @property
    def key(self) -> Mapping[str, Any]:
        from xpert.language_model import model_fingerprint

        settings = {"norms": self.norms, "max_length": self.max_length, "dtype": self.dtype}
        return {"base": model_fingerprint(self.base), "targets": self.targets.fingerprint, **settings, "form": 1}

    def open(self, device: str) -> RowWorker:
        import torch

        from xpert.influence.curvature import BATCH_TOKENS
        from xpert.influence.kronecker import score_layers
        from xpert.language_model import load_model
        from xpert.linear_capture import linear_layers
        from xpert.lora_gradients import check_finite, row_examples

        lm = load_model(self.base, device=device, dtype=self.dtype)
        stored = self.targets.load()
        every = linear_layers(lm.model, "all")
        layers = {name: every[name] for name in stored}
        targets = {name: torch.from_numpy(np.array(array)).to(lm.device) for name, array in stored.items()}
        if not self.norms:
            targets = {name: tensor.to(lm.dtype) for name, tensor in targets.items()}
        groups = len(next(iter(targets.values())))

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            scores = np.full((len(rows), groups), np.nan, np.float32)
            norms = np.full(len(rows), np.nan, np.float32)
            examples = row_examples(lm, rows, self.max_length, BATCH_TOKENS[lm.device.type])
            for indices, batch in examples.batches():
                losses, found, lengths = score_layers(lm, batch, layers, targets, norms=self.norms)
                scores[indices] = found.cpu().numpy()
                norms[indices] = lengths.cpu().numpy()
                check_finite(losses.cpu().numpy(), scores[indices].sum(axis=1), rows, indices)
            return {"scores": scores, "cut": examples.cut, **({"norm": norms} if self.norms else {})}

        return work


def _texts(rows: Sequence[Row]) -> str:
    return hash_texts(text for row in rows for text in (row.prompt, row.response))


def _by_layer(damped: Mapping[str, torch.Tensor], blocks: Mapping[str, Sequence[str]], model: Any) -> Arrays:
    """Blocks taken apart again: a layer's targets are its rows of the block's."""
    found: Arrays = {}
    for name, members in blocks.items():
        start = 0
        for member in members:
            end = start + model.get_submodule(member).out_features
            found[member] = damped[name][:, start:end].contiguous().cpu().numpy()
            start = end
    return found
