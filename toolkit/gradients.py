"""Passes over rows that need gradients: sketched LoRA gradients, exact scores against fixed targets, gradient norms.

What is kept of a row is small: its sketched gradient of unit length, or one number per group of targets. How the
gradients come about is in `lora_gradients.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.lora_training import Checkpoint
from xpert.protocols import RowWorker
from xpert.records import Row
from xpert.storage import hash_json, hash_texts

if TYPE_CHECKING:
    import torch

    from xpert.lora_gradients import RowExamples

__all__ = ["AdapterGradients", "ExactScores", "GradientNorms", "GradientOptions", "GradientPass", "gradient_dtype"]

SHARD_ROWS = 64
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
_LEAST = 1e-30
_Take = Callable[[str, "torch.Tensor"], Any]


@dataclass(frozen=True)
class GradientOptions(Config):
    """How gradients are taken and kept."""

    sketch_dim: int = option(8192, "numbers kept of a gradient", minimum=1)
    sketch: str = option("fold", "how gradients are shortened to them", choices=("fold", "countsketch"))
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end", minimum=8)
    dtype: str = option("float32", "of the base model", choices=("float32", "bfloat16"))
    seed: int = option(0, "of the sketch", minimum=0)


def gradient_dtype(dtype: str, device: str) -> str:
    """`auto` as a dtype: bfloat16 on CUDA and on CPUs that multiply in it, else float32 (bfloat16 is slower there)."""
    if dtype != "auto":
        return dtype
    import torch

    from xpert.language_model import resolve_device

    if resolve_device(device).type == "cuda":
        return "bfloat16"
    abilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else "float32"


@dataclass(frozen=True)
class GradientPass:
    """A pass: the gradient of every row's mean answer loss with respect to a LoRA adapter, sketched.

    C checkpoints, D = `sketch_dim`. Arrays per row: `gradient` [C, D] float16 of unit length (zeros where the gradient
    is zero), `norm` [C] float32, the exact length before the sketch, and `cut`, whether the row was longer than
    `max_length`. `form` "adam" takes what Adam would make of the gradient from the checkpoint's moments (LESS's form
    of a training row), "plain" the gradient itself. NaN where a prompt leaves no room for its answer. Raises BadInput
    naming a row whose loss or gradient is no number. Cost: one forward and one backward pass a row and checkpoint,
    4 D b bytes beside the model's for a batch of b rows; kept: 2 C D bytes a row.
    """

    base: str
    checkpoints: tuple[Checkpoint, ...]
    options: GradientOptions = GradientOptions()
    form: str = "plain"
    name: ClassVar[str] = "gradients"
    shard_rows: ClassVar[int] = SHARD_ROWS

    @property
    def key(self) -> Mapping[str, Any]:
        return {**_key(self.base, self.checkpoints, self.options.to_dict()), "form": self.form}

    def open(self, device: str) -> RowWorker:
        from xpert.sketches import Sketch

        options = self.options
        gradients = AdapterGradients(self.base, self.checkpoints, self.form, options.dtype, device)
        place = str(gradients.lm.device)
        sketch = Sketch(gradients.sizes, options.sketch_dim, kind=options.sketch, seed=options.seed, device=place)

        def start(number: int, count: int) -> tuple[torch.Tensor, _Take]:
            out = sketch.empty(count)
            return out, lambda name, gradient: sketch.add(out, name, gradient)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            kept = np.full((len(rows), len(self.checkpoints), options.sketch_dim), np.nan, np.float16)
            norms = np.full(kept.shape[:2], np.nan, np.float32)
            examples = gradients.examples(rows, options.max_length)
            for number, indices, out, norm in gradients.run(rows, examples, start):
                unit = out / out.norm(dim=1, keepdim=True).clamp(min=_LEAST)
                kept[indices, number] = unit.cpu().numpy()
                norms[indices, number] = norm
            return {"gradient": kept, "norm": norms, "cut": examples.cut}

        return work


@dataclass(frozen=True)
class ExactScores:
    """A pass: each row's exact cosines with the gradients of fixed target rows, averaged by group; no sketch at all.

    `groups` [K] numbers the group of each target from 0. Arrays per row: `scores` [C, G] float32, for each of C
    checkpoints the mean cosine over each of G groups, `norm` [C] and `cut` as of GradientPass. Rows are taken in
    `form`, targets plain. Targets without room for an answer are left out; raises BadInput where a group has none
    left. Cost: as GradientPass, and K passes for the targets in each process; memory 4 C G P bytes for P adapter
    parameters.
    """

    base: str
    checkpoints: tuple[Checkpoint, ...]
    targets: tuple[Row, ...]
    groups: tuple[int, ...]
    form: str = "plain"
    max_length: int = 1024
    dtype: str = "float32"
    name: ClassVar[str] = "gradient-scores"
    shard_rows: ClassVar[int] = SHARD_ROWS

    @property
    def key(self) -> Mapping[str, Any]:
        texts = hash_texts(text for row in self.targets for text in (row.prompt, row.response))
        settings = {"max_length": self.max_length, "dtype": self.dtype, "form": self.form}
        return {**_key(self.base, self.checkpoints, settings), "targets": texts, "groups": hash_json(list(self.groups))}

    def open(self, device: str) -> RowWorker:
        gradients = AdapterGradients(self.base, self.checkpoints, self.form, self.dtype, device)
        targets = self._targets(gradients)
        groups = max(self.groups) + 1

        def start(number: int, count: int) -> tuple[torch.Tensor, _Take]:
            out = gradients.zeros(count, groups)
            return out, lambda name, gradient: out.addmm_(gradient, targets[number][name].T)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            scores = np.full((len(rows), len(self.checkpoints), groups), np.nan, np.float32)
            norms = np.full(scores.shape[:2], np.nan, np.float32)
            examples = gradients.examples(rows, self.max_length)
            for number, indices, out, norm in gradients.run(rows, examples, start):
                scores[indices, number] = out.cpu().numpy() / np.maximum(norm, _LEAST)[:, None]
                norms[indices, number] = norm
            return {"scores": scores, "norm": norms, "cut": examples.cut}

        return work

    def _targets(self, gradients: AdapterGradients) -> list[dict[str, torch.Tensor]]:
        """Per checkpoint, parameter name -> [G, size]: the mean over each group of the targets' unit gradients."""
        groups = np.array(self.groups)
        # One row a batch: a whole gradient is held at a time, and only here.
        examples = gradients.examples(self.targets, self.max_length, batch_tokens=1)
        counts = np.bincount(groups[examples.readable], minlength=groups.max() + 1)
        if not counts.all():
            raise BadInput(
                f"no target of group {int(counts.argmin()) + 1} has room for its answer in {self.max_length} tokens",
                hint="raise --max-length, or give shorter shots",
            )
        means = [
            {name: gradients.zeros(len(counts), size) for name, size in gradients.sizes.items()}
            for _ in self.checkpoints
        ]

        def start(number: int, count: int) -> tuple[dict[str, torch.Tensor], _Take]:
            whole: dict[str, torch.Tensor] = {}
            return whole, whole.__setitem__

        for number, indices, whole, norm in gradients.run(self.targets, examples, start, plain=True):
            group = int(groups[indices[0]])
            for name, gradient in whole.items():
                means[number][name][group] += gradient[0] / (max(float(norm[0]), _LEAST) * int(counts[group]))
        return means


@dataclass(frozen=True)
class GradientNorms:
    """A pass: the length of the gradient of every row's mean answer loss, with respect to whole layers' weights.

    Arrays per row: `norm` float32, `nll` float32 and `cut`; NaN where a prompt leaves no room for its answer. Raises
    BadInput as GradientPass does. Cost: one forward and one backward pass a row.
    """

    base: str
    layers: tuple[str, ...] = ("all",)
    max_length: int = 1024
    dtype: str = "float32"
    name: ClassVar[str] = "gradient-norms"
    shard_rows: ClassVar[int] = SHARD_ROWS

    @property
    def key(self) -> Mapping[str, Any]:
        settings = {"layers": list(self.layers), "max_length": self.max_length, "dtype": self.dtype}
        return _key(self.base, (), settings)

    def open(self, device: str) -> RowWorker:
        from xpert.language_model import load_model
        from xpert.linear_capture import linear_layers
        from xpert.lora_gradients import check_finite, row_examples, weight_norms

        lm = load_model(self.base, device=device, dtype=self.dtype)
        layers = linear_layers(lm.model, self.layers)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            nll, norms = (np.full(len(rows), np.nan, np.float32) for _ in range(2))
            examples = row_examples(lm, rows, self.max_length, _BATCH_TOKENS[lm.device.type])
            for indices, batch in examples.batches():
                losses, lengths = weight_norms(lm, layers, batch)
                nll[indices], norms[indices] = losses.cpu().numpy(), lengths.cpu().numpy()
                check_finite(nll[indices], norms[indices], rows, indices)
            return {"norm": norms, "nll": nll, "cut": examples.cut}

        return work


class AdapterGradients:
    """A base model and the adapters of some checkpoints: gradients of rows, batch by batch, at each of them."""

    def __init__(self, base: str, checkpoints: Sequence[Checkpoint], form: str, dtype: str, device: str) -> None:
        from xpert.language_model import load_model
        from xpert.linear_capture import linear_layers
        from xpert.lora_gradients import AdamForm, place_factors

        self.lm = load_model(base, device=device, dtype=dtype)
        states = [checkpoint.load() for checkpoint in checkpoints]
        self.factors = [place_factors(self.lm.model, state, self.lm.device) for state in states]
        self.layers = linear_layers(self.lm.model, "all")
        self.sizes = {name: states[0].weights[name].numel() for name in sorted(states[0].weights)}
        self.forms = [AdamForm(state, self.lm.device) for state in states] if form == "adam" else None

    def zeros(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.zeros(*shape, dtype=torch.float32, device=self.lm.device)

    def examples(self, rows: Sequence[Row], max_length: int, batch_tokens: int | None = None) -> RowExamples:
        from xpert.lora_gradients import row_examples

        return row_examples(self.lm, rows, max_length, batch_tokens or _BATCH_TOKENS[self.lm.device.type])

    def run(
        self,
        rows: Sequence[Row],
        examples: RowExamples,
        start: Callable[[int, int], tuple[Any, _Take]],
        *,
        plain: bool = False,
    ) -> Iterator[tuple[int, NDArray[np.int64], Any, NDArray[np.float32]]]:
        """(checkpoint number, row indices, what `start` gave for them, exact norms [b]), batch by batch.

        `start(number, b)` gives (result, take); `take` gets (parameter name, [b, size] float32) of every parameter, in
        the pass's form unless `plain`.
        """
        from xpert.lora_gradients import check_finite, merged, stream_gradients

        for number, factors in enumerate(self.factors):
            form = None if plain or self.forms is None else self.forms[number]
            with merged(self.layers, factors):
                for indices, batch in examples.batches():
                    result, take = start(number, len(indices))
                    squares = self.zeros(len(indices))

                    def hand_on(
                        name: str,
                        gradient: torch.Tensor,
                        form: Any = form,
                        take: _Take = take,
                        squares: torch.Tensor = squares,
                    ) -> None:
                        shaped = gradient if form is None else form(name, gradient)
                        squares.add_(shaped.square().sum(1))
                        take(name, shaped)

                    losses = stream_gradients(self.lm, batch, self.layers, factors, hand_on)
                    norms = squares.sqrt().cpu().numpy()
                    check_finite(losses.cpu().numpy(), norms, rows, indices)
                    yield number, indices, result, norms


def _key(base: str, checkpoints: Sequence[Checkpoint], settings: Mapping[str, Any]) -> dict[str, Any]:
    from xpert.language_model import model_fingerprint

    adapters = [checkpoint.fingerprint for checkpoint in checkpoints]
    return {"base": model_fingerprint(base), "checkpoints": adapters, **settings, "form_of_pass": 1}
