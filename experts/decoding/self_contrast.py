"""Self-contrast: the strong set of experts against a weak one of the same model.

Unchosen experts still know something, if only what the answer is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = ["PLUGIN", "SelfContrast"]


@dataclass(frozen=True)
class SelfContrastOptions(Config):
    beta: float = option(0.5, "how strongly the weak set is subtracted", minimum=0)
    alpha: float = option(0.1, "tokens below this share of the likeliest one are ruled out", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise BadInput("alpha is 0, which rules no token out", hint="write a share such as 0.1")


class SelfContrast:
    """SCMoE: score = (1 + beta) z_strong - beta z_weak on {z_strong >= max z_strong + log alpha}, else -inf.

    z are the logits. For LoRA mixtures the strong set is the request's experts, the weak one the base model alone or
    the lowest ranked expert. With beta 0 this is the strong set, its unlikely tokens ruled out.
    """

    Options: ClassVar[type[Config]] = SelfContrastOptions
    against: ClassVar[str] = "experts"
    source: ClassVar[str] = "SCMoE: Unchosen Experts Can Contribute Too, arXiv:2405.14507"

    def __init__(self, options: SelfContrastOptions) -> None:
        self.options = options

    def combine(self, main: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of the strong and the weak set -> logits to choose by."""
        main, other = main.float(), other.float()
        valid = main >= main.amax(-1, keepdim=True) + math.log(self.options.alpha)
        score = (1 + self.options.beta) * main - self.options.beta * other
        # A row that is no number stays none, for the engine to see.
        return score.masked_fill(~valid & ~main.isnan(), -math.inf)


PLUGIN = SelfContrast
