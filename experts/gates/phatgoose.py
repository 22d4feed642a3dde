"""Each expert's own learned vector says how much it wants a token, and the best two share it (PHATGOOSE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option
from xpert.experts.gates._prototype_gate import PrototypeGate

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "LocalTerm", "PhatgooseGate", "PhatgooseOptions"]


@dataclass(frozen=True)
class PhatgooseOptions(Config):
    top: int = option(2, "experts per token and module; 0: all", minimum=0)
    temperature: float = option(1.0, "of the softmax over the chosen", minimum=1e-6)


class LocalTerm(PrototypeGate):
    """logit_e = LN(x) . LN(v_e) / sqrt(in) from the experts' phatgoose vectors; LN without affine terms."""

    learned: ClassVar[str] = "expert"

    def vectors(self, module: str, experts: Sequence[GatedExpert]) -> list[torch.Tensor | None]:
        from xpert.experts.gates._prototypes import expert_vectors

        return expert_vectors("phatgoose", module, experts)

    def prepared(self, vectors: torch.Tensor) -> torch.Tensor:
        from xpert.experts.gates._prototypes import normed

        return normed(vectors) / math.sqrt(vectors.shape[-1])

    def logits(self, hidden: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        from xpert.experts.gates._prototypes import normed

        return normed(hidden) @ prototypes


class PhatgooseGate(LocalTerm):
    """logit_e = LN(x) . LN(v_e) / sqrt(in), softmax over the `top`, per token and module; LN without affine terms.

    v_e [in] is what `xpert gate --name phatgoose` trains on the finished, frozen expert. A zero vector has logit 0, so
    experts with zero vectors share a token evenly. An expert without the module is not chosen there. A request's bias
    is added to the logits.
    """

    Options = PhatgooseOptions
    cost: ClassVar[str] = "a short training per expert; a token O(e in) per module"
    source: ClassVar[str] = "Muqeeth et al. 2024, https://arxiv.org/abs/2402.05859; r-three/phatgoose"


PLUGIN = PhatgooseGate
