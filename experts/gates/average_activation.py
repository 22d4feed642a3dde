"""The experts whose own prompts left states like a token's: the mean of those states is the prototype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option
from xpert.experts.gates._prototype_gate import PrototypeGate

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "AverageActivationGate", "AverageActivationOptions"]


@dataclass(frozen=True)
class AverageActivationOptions(Config):
    top: int = option(0, "experts per token and module; 0: all", minimum=0)
    temperature: float = option(1.0, "of the softmax; logits grow as the square of the states", minimum=1e-6)


class AverageActivationGate(PrototypeGate):
    """logit_e = x . m_e, softmax over all experts or the `top`, per token and module.

    m_e [in] is the mean of what the module took in at the last prompt token of a few of the expert's rows, as
    `xpert gate --name average-activation` measures it. An expert without the module is not chosen there. A request's
    bias is added to the logits.
    """

    Options = AverageActivationOptions
    learned: ClassVar[str] = "expert"
    cost: ClassVar[str] = "ten prompts per expert; a token O(e in) per module"
    source: ClassVar[str] = "baseline of Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157; microsoft/mttl"

    def vectors(self, module: str, experts: Sequence[GatedExpert]) -> list[torch.Tensor | None]:
        from xpert.experts.gates._prototypes import expert_vectors

        return expert_vectors("average-activation", module, experts)


PLUGIN = AverageActivationGate
