"""How an expert's vectors for token gates are made: the options of `xpert gate` and of `add_gate()`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput, unknown

__all__ = ["KEPT_GATES", "GateOptions", "check_gate_name"]

KEPT_GATES = ("phatgoose", "average-activation")
"""The gates whose vectors an expert keeps in its folder."""

_OF_ONE = {
    "phatgoose": ("steps", "learning_rate", "warmup", "batch_size", "weight_decay"),
    "average-activation": ("prompts",),
}


@dataclass(frozen=True)
class GateOptions(Config):
    """Defaults are PHATGOOSE's, with smaller batches, and mttl's count of prompts."""

    steps: int = option(100, "of phatgoose: optimizer steps", minimum=1)
    learning_rate: float = option(5e-3, "of phatgoose: highest learning rate of AdamW", minimum=0)
    warmup: float = option(
        0.06, "of phatgoose: share of the steps in which the learning rate rises", minimum=0, maximum=0.99
    )
    batch_size: int = option(32, "of phatgoose: rows per optimizer step [the paper: 1024]", minimum=1)
    weight_decay: float = option(0.0, "of phatgoose: decay of AdamW", minimum=0)
    prompts: int = option(10, "of average-activation: how many prompts are averaged, the first ones", minimum=1)
    shots: bool = option(True, "use the selection's shots too; they stand first")
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end", minimum=8)
    dtype: str = option(
        "auto",
        "of the base model; auto is bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise BadInput("learning-rate is 0; nothing would be learned", hint="write a positive number such as 5e-3")

    def of(self, gate: str) -> dict[str, Any]:
        """The options that shape this gate's vectors. Raises BadInput for one that was set and belongs to another."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        foreign = {name: other for other, names in _OF_ONE.items() if other != gate for name in names}
        for name, other in foreign.items():
            if getattr(self, name) != defaults[name]:
                raise BadInput(f"{name.replace('_', '-')} is an option of gate {other}, not of {gate}")
        return {name: value for name, value in self.to_dict().items() if name not in foreign}


def check_gate_name(name: str) -> None:
    """Raises NotFound for an unknown gate, BadInput for one that keeps nothing with the expert."""
    if name in KEPT_GATES:
        return
    if name not in plugins.names("gate"):
        raise unknown("gate", name, KEPT_GATES)
    if plugins.load("gate", name).learned == "mixture":
        raise BadInput(
            f"gate {name} is trained for a whole mixture",
            hint=f"give --mixture MIXTURE; for one expert there are {' and '.join(KEPT_GATES)}",
        )
    raise BadInput(
        f"the gate {name} keeps no vectors of its own with an expert",
        hint=f"name one of {', '.join(KEPT_GATES)} (glider reads those of phatgoose)",
    )
