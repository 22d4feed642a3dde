"""Context contrast: the answer with the context against the one without, as far as the two disagree.

The context may be a document, knowledge, or the K shots themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option

if TYPE_CHECKING:
    import torch

__all__ = ["PLUGIN", "ContextContrast"]


@dataclass(frozen=True)
class ContextContrastOptions(Config):
    floor: float = option(0.0, "least weight of the contrast; 0.3 is the paper's for summaries", minimum=0, maximum=1)


class ContextContrast:
    """AdaCAD: z = (1 + a) z_context - a z_without, a = JSD(softmax z_context || softmax z_without).

    z are the logits, the Jensen-Shannon divergence is in nats, within [0, ln 2], and computed anew for every token:
    where the context changes nothing, nothing is contrasted. `floor` is the least a.
    """

    Options: ClassVar[type[Config]] = ContextContrastOptions
    against: ClassVar[str] = "prompt"
    source: ClassVar[str] = "AdaCAD: Adaptively Decoding to Balance Conflicts, arXiv:2409.07394"

    def __init__(self, options: ContextContrastOptions) -> None:
        self.options = options

    def combine(self, main: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] with and without the context -> logits to choose by."""
        main, other = main.float(), other.float()
        weight = _divergence(main, other).clamp(min=self.options.floor)[:, None]
        contrasted = main + weight * (main - other)
        return contrasted.where(~main.isneginf(), main)  # what the model rules out stays so; inf - inf is no number


def _divergence(main: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the rows' distributions [rows], in nats; exactly 0 where they are equal."""
    p, q = main.log_softmax(-1), other.log_softmax(-1)
    mean = (p.exp() + q.exp()).div(2).log()
    terms = [(x.exp() * (x - mean)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(-1) for x in (p, q)]
    return ((terms[0] + terms[1]) / 2).clamp(min=0)


PLUGIN = ContextContrast
