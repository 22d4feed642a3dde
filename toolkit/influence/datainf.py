"""DataInf: influence by a closed form, layer by layer, on the gradients of a LoRA adapter.

With n rows whose gradients with respect to a parameter l are g_i, and v the mean gradient of the targets,

    lambda_l = 0.1 mean_i mean(g_i^2)
    h_l = (1 / (n lambda_l)) sum_i [v - (v . g_i) / (lambda_l + |g_i|^2) g_i]

is v under the mean of the rows' inverses (lambda_l + g_i g_i^T)^-1, and sum_l <h_l, g(z)> the influence of a row z:
higher helps (the paper's sign is the opposite). On an adapter that was not trained B is 0, and with it every gradient
of A: what counts then are the gradients of B behind a random A. Source: Kwon et al. 2024, arXiv:2310.00902.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.array_cache import Arrays
from xpert.errors import BadInput
from xpert.gradients import AdapterGradients
from xpert.influence.grouping import comparable
from xpert.influence.stored import StoredTargets
from xpert.lora_training import Checkpoint
from xpert.progress import SILENT, Progress
from xpert.protocols import RowWorker
from xpert.records import Row
from xpert.storage import hash_texts

if TYPE_CHECKING:
    import torch

__all__ = ["LAMBDA_SHARE", "DatainfScores", "datainf_targets", "row_weights"]

LAMBDA_SHARE = 0.1
_LEAST = 1e-30


def row_weights(products: torch.Tensor, squares: torch.Tensor, size: int) -> tuple[torch.Tensor, float]:
    """(c [n, G], lambda) of one parameter of `size` numbers, so that h = v / lambda - sum_i c_i g_i.

    `products` [n, G] are v . g_i and `squares` [n] are |g_i|^2. Where no row has a gradient, lambda is 0 and c too.
    """
    damp = LAMBDA_SHARE * float(squares.mean()) / size
    if damp <= _LEAST:
        return products * 0, 0.0
    return products / ((damp + squares)[:, None] * (len(squares) * damp)), damp


def datainf_targets(
    base: str,
    checkpoint: Checkpoint,
    pool_rows: Sequence[Row],
    targets: Sequence[Row],
    groups: Sequence[int],
    folder: Path,
    *,
    max_length: int = 1024,
    device: str = "auto",
    progress: Progress = SILENT,
) -> StoredTargets:
    """h of each of G groups of targets [K] by parameter of the adapter: float32 [G, size], kept in `folder`.

    `pool_rows` are the n rows of the closed form: each is passed through the model twice, so that one gradient of a
    batch is held at a time and not all n. Rows without room for an answer are left out; raises BadInput where the
    rows, or a group of targets, have no other. Several groups are brought to unit length, to be compared.
    """
    from xpert.language_model import model_fingerprint, resolve_device

    key = {
        "method": "datainf",
        "base": model_fingerprint(base),
        "checkpoint": checkpoint.fingerprint,
        "rows": hash_texts(text for row in pool_rows for text in (row.prompt, row.response)),
        "targets": hash_texts(text for row in targets for text in (row.prompt, row.response)),
        "groups": list(groups),
        "max_length": max_length,
        "device": resolve_device(device).type,
        "form": 1,
    }

    def make() -> Arrays:
        gradients = AdapterGradients(base, (checkpoint,), "plain", "float32", device)
        v = _group_means(gradients, targets, groups, max_length)
        found = comparable(_closed_form(gradients, pool_rows, v, max_length, progress))
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}

    return StoredTargets.make(folder, key, make, progress)


@dataclass(frozen=True)
class DatainfScores:
    """A pass: the DataInf influence of each row on each of G groups of targets.

    Arrays per row: `scores` [G] float32, `norm`, the length of the row's adapter gradient, and `cut`. NaN where a
    prompt leaves no room for its answer. Raises BadInput naming a row whose loss or gradient is no number. Cost: one
    forward and one backward pass a row; memory 4 G P bytes for P adapter parameters.
    """

    base: str
    checkpoint: Checkpoint
    targets: StoredTargets
    max_length: int = 1024
    dtype: str = "float32"
    name: ClassVar[str] = "datainf-scores"
    shard_rows: ClassVar[int] = 64

    @property
    def key(self) -> Mapping[str, Any]:
        from xpert.language_model import model_fingerprint

        settings = {"max_length": self.max_length, "dtype": self.dtype}
        return {"base": model_fingerprint(self.base), "targets": self.targets.fingerprint, **settings, "form": 1}

    def open(self, device: str) -> RowWorker:
        import torch

        gradients = AdapterGradients(self.base, (self.checkpoint,), "plain", self.dtype, device)
        stored = self.targets.load()
        targets = {name: torch.from_numpy(np.array(array)).to(gradients.lm.device) for name, array in stored.items()}
        groups = len(next(iter(targets.values())))

        def start(number: int, count: int) -> tuple[torch.Tensor, Any]:
            out = gradients.zeros(count, groups)
            return out, lambda name, gradient: out.addmm_(gradient, targets[name].T)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            scores = np.full((len(rows), groups), np.nan, np.float32)
            norms = np.full(len(rows), np.nan, np.float32)
            examples = gradients.examples(rows, self.max_length)
            for _, indices, out, norm in gradients.run(rows, examples, start):
                scores[indices], norms[indices] = out.cpu().numpy(), norm
            return {"scores": scores, "norm": norms, "cut": examples.cut}

        return work


def _group_means(
    gradients: AdapterGradients, rows: Sequence[Row], groups: Sequence[int], max_length: int
) -> dict[str, torch.Tensor]:
    """Parameter -> [G, size]: the mean gradient of each group's rows."""
    import torch

    from xpert.influence.grouping import mean_weights

    examples = gradients.examples(rows, max_length)
    weights = torch.from_numpy(mean_weights(groups, examples.readable, max_length)).to(gradients.lm.device)
    means = {name: gradients.zeros(weights.shape[1], size) for name, size in gradients.sizes.items()}

    def start(number: int, count: int) -> tuple[dict[str, torch.Tensor], Any]:
        found: dict[str, torch.Tensor] = {}
        return found, found.__setitem__

    for _, indices, found, _ in gradients.run(rows, examples, start):
        for name, gradient in found.items():
            means[name].addmm_(weights[torch.from_numpy(indices)].T, gradient)
    return means


def _closed_form(
    gradients: AdapterGradients, rows: Sequence[Row], v: Mapping[str, torch.Tensor], max_length: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """Parameter -> h [G, size]: a first pass for the products with v and the lengths, a second for the sum."""
    import torch

    examples = gradients.examples(rows, max_length)
    readable = np.flatnonzero(examples.readable)
    if not len(readable):
        raise BadInput(
            f"none of the {len(rows)} rows that DataInf inverts has room for its answer in {max_length} tokens",
            hint="raise --max-length",
        )
    place = np.full(len(rows), -1, np.int64)
    place[readable] = np.arange(len(readable))
    n, groups = len(readable), len(next(iter(v.values())))
    products = {name: gradients.zeros(n, groups) for name in v}
    squares = {name: gradients.zeros(n) for name in v}
    weights: dict[str, torch.Tensor] = {}
    h: dict[str, torch.Tensor] = {}

    def measure(name: str, here: torch.Tensor, gradient: torch.Tensor) -> None:
        products[name][here] = gradient @ v[name].T
        squares[name][here] = gradient.square().sum(1)

    def subtract(name: str, here: torch.Tensor, gradient: torch.Tensor) -> None:
        h[name].addmm_(weights[name][here].T, gradient, alpha=-1)

    with progress.task("DataInf, rows", 2 * n) as task:
        for step in (measure, subtract):
            if step is subtract:
                for name, target in v.items():
                    weights[name], damp = row_weights(products[name], squares[name], target.shape[1])
                    h[name] = target / damp if damp else torch.zeros_like(target)

            def start(number: int, count: int) -> tuple[dict[str, torch.Tensor], Any]:
                found: dict[str, torch.Tensor] = {}
                return found, found.__setitem__

            for _, indices, found, _ in gradients.run(rows, examples, start):
                here = torch.from_numpy(place[indices]).to(gradients.lm.device)
                for name, gradient in found.items():
                    step(name, here, gradient)
                task.advance(len(indices))
    return h
