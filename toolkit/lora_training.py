"""Training a LoRA adapter in a small loop of its own, and keeping each epoch with what Adam knew of it.

Selection needs what training leaves on its way: the adapter after every epoch, Adam's moments by parameter name and
the learning rates. torch and peft are imported inside functions, so that naming the options costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert.answer_losses import context_limit, refuse_nan
from xpert.config import Config, option
from xpert.errors import BadInput, XpertError
from xpert.progress import SILENT, Progress
from xpert.records import Row
from xpert.storage import draft_folder, hash_file, hash_json, hash_texts, read_json, write_json

if TYPE_CHECKING:
    import torch

    from xpert.language_model import LanguageModel

__all__ = ["AdapterState", "Checkpoint", "LoraOptions", "train_adapter", "warm_up"]

_PEFT = "base_model.model."
_INDEX = "checkpoints.json"
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class LoraOptions(Config):
    """An adapter and how it is trained. The settings of LESS are in brackets where they differ."""

    rank: int = option(8, "rank of the adapter [128]", minimum=1)
    alpha: int = option(16, "scale of the adapter; its updates are multiplied by alpha / rank [512]", minimum=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    layers: tuple[str, ...] = option(
        ("attention",), "layers that are adapted: attention, mlp, all, or names such as q_proj,v_proj"
    )
    dropout: float = option(0.1, "share of adapter inputs zeroed in training", minimum=0, maximum=0.99)
    learning_rate: float = option(2e-4, "highest learning rate of AdamW [2e-5]", minimum=0)
    rise: float = option(0.03, "share of the steps in which the learning rate rises", minimum=0, maximum=0.99)
    epochs: int = option(4, "passes over the rows", minimum=1)
    batch_size: int = option(16, "rows per optimizer step [128]", minimum=1)
    weight_decay: float = option(0.0, "decay of AdamW", minimum=0)
    max_gradient_norm: float = option(1.0, "longer gradients are scaled down to this norm; 0: never", minimum=0)
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end [2048]", minimum=8)
    dtype: str = option(
        "auto", "of the base model; auto is bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )


@dataclass(frozen=True)
class AdapterState:
    """An adapter in memory, float32 on the CPU.

    `weights`, `first` and `second` (Adam's moments m and v; empty where no step was made) are keyed by parameter name:
    `model.layers.0.self_attn.q_proj.lora_A` [rank, d_in], `....lora_B` [d_out, rank]. `learning_rate` is the mean over
    the steps of the epoch that led here.
    """

    weights: Mapping[str, torch.Tensor]
    rank: int
    alpha: int
    rslora: bool = False
    first: Mapping[str, torch.Tensor] = field(default_factory=dict)
    second: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learning_rate: float = 0.0
    steps: int = 0

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the adapted layers."""
        return tuple(name.removesuffix(".lora_A") for name in self.weights if name.endswith(".lora_A"))

    def save(self, folder: Path, base: str | None = None) -> Checkpoint:
        """Writes an adapter folder as peft reads it, and `moments.safetensors` beside it."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        settings: Any = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            use_rslora=self.rslora,
            target_modules=sorted(self.layers),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
        )
        # peft holds the names as a set, whose order differs from run to run.
        settings.target_modules = sorted(self.layers)
        settings.save_pretrained(folder)
        plain = {f"{_PEFT}{name}.weight": tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        moments = {f"m.{name}": tensor.contiguous() for name, tensor in self.first.items()}
        moments |= {f"v.{name}": tensor.contiguous() for name, tensor in self.second.items()}
        save_file(moments, folder / "moments.safetensors", metadata={"format": "pt"})
        about = {
            "rank": self.rank,
            "alpha": self.alpha,
            "rslora": self.rslora,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
        }
        files = {name: hash_file(folder / name) for name in ("adapter_model.safetensors", "moments.safetensors")}
        write_json(folder / "checkpoint.json", {**about, "fingerprint": hash_json({**about, **files})})
        return Checkpoint.open(folder)


@dataclass(frozen=True)
class Checkpoint:
    """An adapter on disk, small enough to be sent to where it is read. `fingerprint` is of its content."""

    folder: Path
    fingerprint: str
    learning_rate: float
    steps: int

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises NotFound where there is none."""
        about = read_json(folder / "checkpoint.json")
        return cls(folder, about["fingerprint"], about["learning_rate"], about["steps"])

    def load(self) -> AdapterState:
        """Raises BadInput where its files are gone or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        about = read_json(self.folder / "checkpoint.json")
        try:
            weights = load_file(self.folder / "adapter_model.safetensors")
            moments = load_file(self.folder / "moments.safetensors")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"the adapter cannot be read: {error}", where=str(self.folder)) from None
        return AdapterState(
            {name.removeprefix(_PEFT).removesuffix(".weight"): tensor for name, tensor in weights.items()},
            about["rank"],
            about["alpha"],
            about["rslora"],
            {name[2:]: tensor for name, tensor in moments.items() if name.startswith("m.")},
            {name[2:]: tensor for name, tensor in moments.items() if name.startswith("v.")},
            about["learning_rate"],
            about["steps"],
        )


def warm_up(
    base: str,
    rows: Sequence[Row],
    options: LoraOptions,
    folder: Path,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Checkpoint]:
    """Trains an adapter on `rows` and keeps one checkpoint per epoch in a folder of its own under `folder`.

    Without rows there is one checkpoint: the new adapter, which changes nothing yet (B = 0). The same base, rows,
    options, seed and kind of device are recognised, and what was kept is read. Errors as `train_adapter`.
    """
    from xpert.language_model import load_model, model_fingerprint, resolve_device

    key = {
        "base": model_fingerprint(base),
        "rows": hash_texts(text for row in rows for text in (row.prompt, row.response)),
        "options": options.to_dict(),
        "seed": seed,
        "device": resolve_device(device).type,
        "form": 1,
    }
    target = folder / f"warm-up-{hash_json(key)[:32]}"
    if (found := _kept(target, progress)) is not None:
        return found
    lm = load_model(base, device=device, dtype=options.dtype)
    states = train_adapter(lm, rows, options, seed=seed, progress=progress)
    try:
        with draft_folder(target, replace=target.exists()) as draft:
            names = [f"epoch-{number}" for number in range(1, len(states) + 1)]
            for name, state in zip(names, states, strict=True):
                state.save(draft / name, base)
            write_json(draft / _INDEX, {"key": key, "checkpoints": names})
    except BadInput:
        # Another process has finished the same meanwhile; its result serves as well.
        if (found := _kept(target, progress)) is not None:
            return found
        raise
    return [Checkpoint.open(target / name) for name in names]


def train_adapter(
    lm: LanguageModel,
    rows: Sequence[Row],
    options: LoraOptions,
    *,
    start: AdapterState | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[AdapterState]:
    """Trains a LoRA adapter of `lm` with AdamW and returns its state after every epoch; `lm` is left as it was.

    The loss of a step is the mean over the answer tokens of its rows. The learning rate rises over the first `rise`
    of the steps and falls linearly to 0. `start`: an adapter to go on from, with moments new. Without rows: one
    state, the adapter untrained. Deterministic by seed. Raises BadInput where a layer is not there, `start` does not
    fit, no row has room for its answer, or a row's loss is no number.
    """
    import torch

    from xpert.linear_capture import encode_rows

    examples = encode_rows(lm.tokenizer, rows, context_limit(lm, options.max_length))
    readable = [index for index, (ids, first) in enumerate(examples) if max(first, 1) < len(ids)]
    if rows and not readable:
        raise BadInput(
            f"none of the {len(rows)} warm-up rows has room for its answer in {options.max_length} tokens",
            hint="raise max-length",
        )
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _adapted(lm, options, start, seed) as parameters:
        if not rows:
            return [_state(parameters, options)]
        run = _Run(lm, parameters, options, [examples[i] for i in readable], [rows[i] for i in readable], seed)
        return run.train(progress)


class _Run:
    """One training: its optimizer and the course of its learning rate."""

    def __init__(
        self,
        lm: LanguageModel,
        parameters: Mapping[str, Any],
        options: LoraOptions,
        examples: Sequence[tuple[tuple[int, ...], int]],
        rows: Sequence[Row],
        seed: int,
    ) -> None:
        import torch

        self.lm, self.parameters, self.options = lm, parameters, options
        self.examples, self.rows, self.seed = examples, rows, seed
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=options.learning_rate, eps=1e-8, weight_decay=options.weight_decay
        )
        self.total = options.epochs * -(-len(examples) // options.batch_size)
        self.steps = 0

    def train(self, progress: Progress) -> list[AdapterState]:
        states = []
        with progress.task(f"warm-up on {len(self.rows):,} rows, steps", self.total) as task:
            for epoch in range(self.options.epochs):
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
                rates = []
                for begin in range(0, len(order), self.options.batch_size):
                    rates.append(self._step(order[begin : begin + self.options.batch_size]))
                    task.advance(1)
                states.append(self._state(float(np.mean(rates))))
        return states

    def _step(self, indices: Any) -> float:
        """One optimizer step over these rows, in passes of like length; returns its learning rate."""
        import torch

        from xpert.linear_capture import length_batches, make_batch, row_losses

        counts = [len(self.examples[i][0]) - max(self.examples[i][1], 1) for i in indices]
        for part in length_batches([len(self.examples[i][0]) for i in indices], _BATCH_TOKENS):
            chosen = indices[part]
            batch = make_batch([self.examples[i] for i in chosen], self.lm.device)
            losses = row_losses(self.lm.model, batch)
            measured = losses.detach().cpu().numpy()
            refuse_nan(measured, np.ones(len(part), bool), [self.rows[i] for i in chosen], "the training loss")
            (losses * batch.answer_tokens).sum().div(sum(counts)).backward()  # type: ignore[no-untyped-call]
        if self.options.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.max_gradient_norm)
        rate = self.options.learning_rate * _course(self.steps, self.total, self.options.rise)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return rate

    def _state(self, rate: float) -> AdapterState:
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return _state(
            self.parameters,
            self.options,
            first={name: _copied(kept["exp_avg"]) for name, kept in moments.items()},
            second={name: _copied(kept["exp_avg_sq"]) for name, kept in moments.items()},
            learning_rate=rate,
            steps=self.steps,
        )


def _course(step: int, total: int, rise: float) -> float:
    """The share of the highest learning rate at a step: up over the first, down to 0 after the last."""
    rising = int(np.ceil(rise * total))
    if step < rising:
        return (step + 1) / (rising + 1)
    return (total - step) / (total - rising)


@contextmanager
def _adapted(
    lm: LanguageModel, options: LoraOptions, start: AdapterState | None, seed: int
) -> Iterator[dict[str, Any]]:
    """The adapter's parameters by name, in training mode; afterwards the model is without it and as before."""
    import torch
    from peft import LoraConfig, get_peft_model

    from xpert.linear_capture import linear_layers

    layers = linear_layers(lm.model, options.layers)
    flags = [(parameter, parameter.requires_grad) for parameter in lm.model.parameters()]
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        use_rslora=options.rslora,
        lora_dropout=options.dropout,
        target_modules=sorted(layers),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # What peft and transformers tell each other of coming versions is not for the user.
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted: Any = get_peft_model(lm.model, settings)
    try:
        parameters = {
            name.removeprefix(_PEFT).removesuffix(".default.weight"): parameter
            for name, parameter in adapted.named_parameters()
            if ".lora_" in name
        }
        if start is not None:
            _put(parameters, start, options)
        adapted.train()
        yield parameters
    finally:
        adapted.unload()
        lm.model.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _put(parameters: Mapping[str, Any], start: AdapterState, options: LoraOptions) -> None:
    import torch

    shape = (start.rank, start.alpha, start.rslora)
    if set(start.weights) != set(parameters) or shape != (options.rank, options.alpha, options.rslora):
        raise BadInput(
            "the adapter to go on from has other layers, another rank or another scale than the one to train",
            hint="train with the options it was made with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start.weights[name])


def _state(parameters: Mapping[str, Any], options: LoraOptions, **more: Any) -> AdapterState:
    weights = {name: _copied(parameter) for name, parameter in parameters.items()}
    return AdapterState(weights, options.rank, options.alpha, options.rslora, **more)


def _copied(tensor: Any) -> Any:
    import torch

    return tensor.detach().to("cpu", torch.float32, copy=True)


def _kept(target: Path, progress: Progress) -> list[Checkpoint] | None:
    """The checkpoints of a finished warm-up; None where there are none, or they are damaged, which is said."""
    if not target.is_dir():
        return None
    try:
        found = [Checkpoint.open(target / name) for name in read_json(target / _INDEX)["checkpoints"]]
        for checkpoint in found:
            checkpoint.load()
    except (XpertError, OSError, KeyError, TypeError) as error:
        progress.say(f"stored warm-up is damaged and is made again ({target}: {error})")
        return None
    return found
