"""Harder inputs take more experts: the likeliest ones until their probability exceeds p (Dynamic MoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import option
from xpert.experts.gates._learned import Decide, LearnedGate, RouterOptions, Routing, drawn, rows_of

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "TopP", "TopPOptions"]


@dataclass(frozen=True)
class TopPOptions(RouterOptions):
    p: float = option(0.4, "experts are taken until their probability exceeds this; 1: all", minimum=0, maximum=1)
    renormalise: bool = option(
        True, "the taken weights add up to 1; else they are the probabilities themselves, as in the paper"
    )
    balance_weight: float = option(0.01, "weight of the balance loss", minimum=0)
    entropy_weight: float = option(1e-4, "weight of the router's entropy, which keeps few experts in use", minimum=0)


class TopP(LearnedGate):
    """p = softmax(W x), largest first; the smallest prefix whose mass exceeds `p` stays, one expert at least.

    A token the router is sure of takes one expert, one it is unsure of takes several. The published weights are the
    raw probabilities; for experts trained before, whose updates would shrink with the router's doubt, they are
    renormalised. Trained with the balance loss e sum_e f_e P_e and the entropy of p.
    """

    Options = TopPOptions
    options: TopPOptions
    cost: ClassVar[str] = "joint training; a token O(e in) per site"
    source: ClassVar[str] = "Huang et al. 2024, arXiv:2403.07652; ZhenweiAn/Dynamic_MoE"

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_p

        router = rows_of(self._tensor(module, "router", experts), columns)
        mass, renormalise = self.options.p, self.options.renormalise

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            logits = logits_of(hidden, router(), bias)
            probabilities = softmax_over(logits, allowed)
            chosen = top_p(probabilities, allowed, mass)
            weights = softmax_over(logits, chosen) if renormalise else probabilities * chosen
            return Routing(weights, probabilities, chosen, columns)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {f"{site}.router": drawn(len(experts), width, self.options.init, generator)}

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        from xpert.experts.gates._learned_losses import entropy, switch_balance

        balance = switch_balance(routing.probabilities, routing.chosen, mask) * self.options.balance_weight
        return balance + entropy(routing.probabilities, mask) * self.options.entropy_weight


PLUGIN = TopP
