"""What gates with one vector per expert and module share: one product gives the logits, a softmax the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert, ModuleGate

__all__ = ["PrototypeGate"]


class PrototypeGate:
    """A gate whose logits are a product of a token's state with a vector per expert.

    A member says where the vectors come from (`vectors`), how they are prepared (`prepared`), what the logits are
    (`logits`), and who is chosen (`choose`; by default a softmax over its options' `top` at their `temperature`). An
    expert without the module is not chosen there; a request's bias is added to the logits.
    """

    grain: ClassVar[str] = "expert"

    def __init__(
        self,
        options: Any,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        experts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        # Nothing of a mixture is learned and nothing is drawn: only the options matter here.
        self.options = options

    def site(self, module: str) -> str:
        return module

    def vectors(self, module: str, experts: Sequence[GatedExpert]) -> list[torch.Tensor | None]:
        """[in] of each expert; None where it does not adapt the module."""
        raise NotImplementedError

    def prepared(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32 [e, in] -> what the logits are made with, once."""
        return vectors

    def logits(self, hidden: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """hidden [rows, tokens, in], prototypes [in, e] -> float32 [rows, tokens, e]."""
        return hidden.float() @ prototypes

    def biased(self, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return logits + bias

    def choose(self, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        from xpert.experts.gates._choosing import softmax_top_k

        return softmax_top_k(logits, allowed, self.options.top or logits.shape[-1], self.options.temperature)

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        import torch

        from xpert.experts.gates._prototypes import constants, stack

        with constants():
            stacked = stack(self.vectors(module, experts))
            if stacked is None:
                count = len(experts)
                return lambda hidden, allowed, bias: hidden.new_zeros(*hidden.shape[:2], count, dtype=torch.float32)
            prototypes, present = self.prepared(stacked[0]).T.contiguous(), stacked[1]

        def gate(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            logits = self.logits(hidden, prototypes)
            if bias is not None:
                logits = self.biased(logits, bias)
            return self.choose(logits, allowed if present is None else allowed & present)

        return gate
