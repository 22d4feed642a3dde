"""The configuration of a distillation: the options of `xpert distil` and of `distil()`."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option
from xpert.errors import BadInput

__all__ = ["DistilOptions"]


@dataclass(frozen=True)
class DistilOptions(Config):
    """How the student is shaped and taught."""

    rank: int = option(16, "largest rank of a module of the student", minimum=1)
    start: str = option(
        "merged", "the student begins as the svd merge by mean weights, or as the base", choices=("merged", "base")
    )
    temperature: float = option(2.0, "both distributions are softened by it")
    ce: float = option(0.0, "weight of the cross-entropy of the rows' own answers", minimum=0)
    learning_rate: float = option(2e-4, "of AdamW, constant")
    epochs: int = option(3, "passes over the rows", minimum=1)
    batch_size: int = option(4, "rows per step", minimum=1)
    max_length: int = option(1024, "longest row in tokens: longer ones are cut at their end", minimum=8)
    hold_out: float = option(0.1, "share of the rows that only measure", minimum=0, maximum=0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be a finite number above 0")
