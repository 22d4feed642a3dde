"""A trained softmax router: the best k experts share a token, or all of them (MixLoRA, LoRAMoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import option
from xpert.errors import BadInput
from xpert.experts.gates._learned import Decide, LearnedGate, RouterOptions, Routing, drawn, rows_of

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "SoftmaxTopK", "SoftmaxTopKOptions"]


@dataclass(frozen=True)
class SoftmaxTopKOptions(RouterOptions):
    top: int = option(2, "experts per token; 0: all (LoRAMoE)", minimum=0)
    balance: str = option(
        "none", "what keeps all experts in use while training", choices=("none", "switch", "localised")
    )
    balance_weight: float = option(
        0.001, "weight of the balance loss (MixLoRA: 0.001 of switch; LoRAMoE: about 0.1 of localised)", minimum=0
    )
    delta: float = option(0.1, "of localised: how far the two kinds of rows are driven apart", minimum=0, maximum=0.99)
    knowledge_skills: tuple[str, ...] = option(
        (), "of localised: skills whose rows ask for world knowledge; the second half of the experts leaves them"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance == "localised" and not self.knowledge_skills:
            raise BadInput("balance localised needs knowledge-skills", hint="name the skills of one kind of row")
        if self.balance != "localised" and self.knowledge_skills:
            raise BadInput(f"knowledge-skills has no meaning with balance {self.balance}")


class SoftmaxTopK(LearnedGate):
    """p = softmax(W x) over the experts; the `top` largest, renormalised; with top = 0 all of them.

    W [e, in] has no bias and computes in float32. With `per` = block a feed-forward block is routed once, by its
    input, as in MixLoRA; else each linear layer by its own. Balance in training: `switch` is e sum_e f_e P_e;
    `localised` is LoRAMoE's, which drives two kinds of rows to two halves of the experts (in the mixture's order):
    the flat point of its loss has rows of `knowledge_skills` lean to the first half and the others to the second.
    """

    Options = SoftmaxTopKOptions
    options: SoftmaxTopKOptions
    cost: ClassVar[str] = "joint training; a token O(e in) per site"
    source: ClassVar[str] = "MixLoRA, arXiv:2404.15159; LoRAMoE, arXiv:2312.09979"

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_k

        router = rows_of(self._tensor(module, "router", experts), columns)
        top = self.options.top

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            logits = logits_of(hidden, router(), bias)
            chosen = top_k(logits, allowed, top)
            probabilities = softmax_over(logits, allowed)
            return Routing(softmax_over(logits, chosen), probabilities, chosen, columns)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {f"{site}.router": drawn(len(experts), width, self.options.init, generator)}

    def row_kinds(self, skills: Sequence[str | None]) -> list[int] | None:
        if self.options.balance != "localised":
            return None
        return [int(skill not in self.options.knowledge_skills) for skill in skills]

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        import torch

        from xpert.experts.gates._learned_losses import localised_balance, switch_balance

        weight = self.options.balance_weight
        if self.options.balance == "none" or not weight:
            return None
        if self.options.balance == "switch":
            return switch_balance(routing.probabilities, routing.chosen, mask) * weight
        assert kinds is not None
        first = torch.tensor([column < len(self.experts) // 2 for column in routing.columns], device=mask.device)
        return localised_balance(routing.probabilities, mask, kinds, first, self.options.delta) * weight


PLUGIN = SoftmaxTopK
