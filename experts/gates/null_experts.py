"""Easy tokens take fewer experts: some of the k places may go to experts that do nothing (AdaMoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import option
from xpert.experts.gates._learned import Decide, LearnedGate, RouterOptions, Routing, drawn, rows_of

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "NullExperts", "NullExpertsOptions"]


@dataclass(frozen=True)
class NullExpertsOptions(RouterOptions):
    nulls: int = option(4, "experts that do nothing; the paper has twice as many as real ones", minimum=1)
    top: int = option(4, "choices per token, real and null together", minimum=1)
    balance_weight: float = option(0.01, "weight of the balance loss", minimum=0)


class NullExperts(LearnedGate):
    """p = softmax over e real and m null logits; of the `top` likeliest the real ones share the token, renormalised.

    A token whose choices are all null gets no update. When balanced, top e / (e + m) real experts are used a token. In
    the balance loss (e + m) sum f P the nulls count with their mean share: which of them is chosen makes no
    difference. (One of the published runs averages along the wrong axis, which changes nothing there.)
    """

    Options = NullExpertsOptions
    options: NullExpertsOptions
    cost: ClassVar[str] = "joint training; a token O((e + m) in) per site"
    source: ClassVar[str] = "Zeng et al. 2024, arXiv:2406.13233; CengZihao/AdaMoE"

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        import torch

        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_k

        router = rows_of(self._tensor(module, "router", experts), columns)
        nulls = self._tensor(module, "nulls", experts)
        top, count = self.options.top, len(columns)

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            real = logits_of(hidden, router(), bias)
            logits = torch.cat([real, logits_of(hidden, nulls, None)], dim=-1)
            # Nulls are there for whoever has a real choice; a row without any is left out whole.
            beside = allowed.any(-1, keepdim=True).expand(*allowed.shape[:-1], len(nulls))
            open_ = torch.cat([allowed, beside], dim=-1)
            chosen = top_k(logits, open_, top)
            return Routing(softmax_over(real, chosen[..., :count]), softmax_over(logits, open_), chosen, columns)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {
            f"{site}.router": drawn(len(experts), width, self.options.init, generator),
            f"{site}.nulls": drawn(self.options.nulls, width, self.options.init, generator),
        }

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        from xpert.experts.gates._learned_losses import null_balance

        count = routing.weights.shape[-1]
        return null_balance(routing.probabilities, routing.chosen, mask, count) * self.options.balance_weight


PLUGIN = NullExperts
