"""The configuration of a training run: the options of `xpert train` and of `train()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.gate_options import KEPT_GATES

__all__ = ["TrainOptions"]


@dataclass(frozen=True)
class TrainOptions(Config):
    """Defaults suit some hundred rows; the adapter covers every linear layer but the output head."""

    rank: int = option(16, "rank of the adapter", minimum=1)
    alpha: int = option(32, "scale of the adapter; its updates are multiplied by alpha / rank", minimum=1)
    dropout: float = option(0.05, "share of adapter inputs zeroed in training", minimum=0, maximum=0.99)
    target_modules: tuple[str, ...] = option(("all-linear",), "names of the layers that are adapted, or all-linear")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    learning_rate: float = option(2e-4, "highest learning rate of AdamW", minimum=0)
    scheduler: str = option("cosine", "course of the learning rate", choices=("cosine", "linear", "constant"))
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", minimum=0, maximum=0.99)
    epochs: float = option(3.0, "passes over the rows", minimum=0)
    max_steps: int | None = option(None, "stop after this many optimizer steps, whatever --epochs says", minimum=1)
    batch_size: int = option(8, "rows per device and pass", minimum=1)
    gradient_accumulation: int = option(1, "passes per optimizer step", minimum=1)
    weight_decay: float = option(0.0, "decay of AdamW", minimum=0)
    max_gradient_norm: float = option(1.0, "longer gradients are scaled down to this norm; 0: never", minimum=0)
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end", minimum=8)
    shots: bool = option(True, "train on the selection's shots too")
    hold_out_shots: str = option("0", "shots kept out for a validation loss: a number or a share such as 25%")
    dtype: str = option(
        "auto",
        "of the base model; auto is bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    gate: str | None = option(
        None,
        "make the expert's vectors for this token gate too; with --mixture: the gate whose router is trained",
        choices=KEPT_GATES,
    )
    activation_checkpointing: bool = option(False, "recompute activations: less memory, about a third slower")
    checkpoint_steps: int = option(50, "steps between the checkpoints a killed run goes on from", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise BadInput("learning-rate is 0; nothing would be learned", hint="write a positive number such as 2e-4")
        if not self.epochs > 0:
            raise BadInput("epochs is 0; nothing would be learned", hint="write a positive number, or set --max-steps")
        if not self.target_modules or not all(self.target_modules):
            raise BadInput("target-modules is empty", hint="write all-linear, or names such as q_proj,v_proj")
        if "lm_head" in self.target_modules:
            raise BadInput("target-modules may not hold lm_head: the output head is shared by all experts")

    def shaping(self) -> dict[str, Any]:
        """The options that shape the result, which is all but how often work is saved."""
        left_out = {"checkpoint_steps"} if self.gate else {"checkpoint_steps", "gate"}
        return {name: value for name, value in self.to_dict().items() if name not in left_out}
