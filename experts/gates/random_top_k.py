"""A random router that is never trained; training begins with few experts a token and ends with all (SMoE-Dropout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xpert.config import Config, option
from xpert.experts.gates._learned import Decide, LearnedGate, Routing, drawn, rows_of

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "RandomTopK", "RandomTopKOptions"]


@dataclass(frozen=True)
class RandomTopKOptions(Config):
    top: int = option(0, "experts per token when answering; 0: all", minimum=0)
    first_top: int = option(1, "experts per token in the first training step; the last has all", minimum=1)
    per: str = option(
        "layer", "what is routed on its own: each layer, or each feed-forward block as one", choices=("layer", "block")
    )


class RandomTopK(LearnedGate):
    """softmax over the `top` largest of W x, W drawn once from N(0, 1 / in) and fixed.

    In training the number of experts grows linearly from `first_top` to all, like a dropout of experts that fades, so
    that the mixture can afterwards be used with any `top`. The router is stored with the mixture, not drawn again.
    """

    Options = RandomTopKOptions
    options: RandomTopKOptions
    cost: ClassVar[str] = "joint training of the experts alone; a token O(e in) per site"
    source: ClassVar[str] = "Chen et al. 2023, arXiv:2303.01610; VITA-Group/Random-MoE-as-Dropout"

    def __init__(self, options: RandomTopKOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self.top = options.top
        """Experts per token now."""

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_k

        router = rows_of(self._tensor(module, "router", experts), columns)

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            logits = logits_of(hidden, router(), bias)
            chosen = top_k(logits, allowed, self.top)
            return Routing(softmax_over(logits, chosen), softmax_over(logits, allowed), chosen, columns)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {f"{site}.router": drawn(len(experts), width, width**-0.5, generator)}

    def trains(self, name: str) -> bool:
        return False

    def before_step(self, done: int, planned: int) -> None:
        last = len(self.experts)
        first = min(self.options.first_top, last)
        self.top = first + int((last - first) * done / max(planned - 1, 1) + 0.5)


PLUGIN = RandomTopK
