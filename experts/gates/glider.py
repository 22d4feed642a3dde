"""PHATGOOSE's word on the token and a description's word on the request, added (GLIDER)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.gates.phatgoose import LocalTerm

if TYPE_CHECKING:
    import torch

    from xpert.experts.gate_bias import ExpertCosines
    from xpert.protocols import RoutableExpert

__all__ = ["PLUGIN", "GliderGate", "GliderOptions"]


@dataclass(frozen=True)
class GliderOptions(Config):
    alpha: float = option(3.0, "weight of the cosine between request and expert [100 for tasks trained on]", minimum=0)
    top: int = option(2, "experts per token and module; 0: all", minimum=0)
    top_p: float | None = option(
        None, "take the fewest experts whose probability reaches this, instead of `top`", minimum=0, maximum=1
    )
    temperature: float = option(1.0, "of the softmax", minimum=1e-6)
    embedder: str = option("lsa", "how requests and experts are embedded: lsa, minilm, st:NAME or lm")
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is not None and self.top != GliderOptions.top:
            raise BadInput("top and top-p are both given", hint="leave one of them out")


class GliderGate(LocalTerm):
    """logit_e = LN(x) . LN(v_e) / sqrt(in) + alpha cos(request, expert), softmax over the `top`, or the `top-p`.

    The local term is PHATGOOSE's, from the vectors that `xpert gate --name phatgoose` trains. The cosines come with
    the request, as its bias: `request_bias` makes them, from an embedding of the prompt and one of what each expert is
    for. The paper lets a large model describe the request's task first; here the prompt speaks for itself. Without
    a bias, the local term decides alone. An expert without the module is not chosen there.
    """

    Options = GliderOptions
    cost: ClassVar[str] = "as phatgoose, and one embedding a request"
    source: ClassVar[str] = "Li et al. 2024, https://arxiv.org/abs/2410.07172; UNITES-Lab/glider"

    def biased(self, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        alpha: float = self.options.alpha
        return logits + alpha * bias

    def choose(self, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        if self.options.top_p is None:
            return super().choose(logits, allowed)
        from xpert.experts.gates._choosing import softmax_top_p

        return softmax_top_p(logits, allowed, self.options.top_p, self.options.temperature)

    def request_bias(
        self,
        experts: Sequence[RoutableExpert],
        *,
        descriptions: Mapping[str, str] | None = None,
        base: str | None = None,
        device: str = "auto",
        seed: int = 0,
    ) -> ExpertCosines:
        """What gives requests their bias over these experts; see `ExpertCosines`. `base`: the mixture's."""
        from xpert.experts.gate_bias import ExpertCosines

        return ExpertCosines(
            experts,
            embedder=self.options.embedder,
            descriptions=descriptions,
            base=self.options.base or base,
            device=device,
            seed=seed,
        )


PLUGIN = GliderGate
