"""Some experts are always on, and the best k of the others join them (DeepSeekMoE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xpert.config import option
from xpert.errors import BadInput, unknown
from xpert.experts.gates._learned import Decide, LearnedGate, RouterOptions, Routing, device_of, drawn, rows_of

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "SharedExperts", "SharedExpertsOptions"]


@dataclass(frozen=True)
class SharedExpertsOptions(RouterOptions):
    shared: tuple[str, ...] = option((), "keys of the experts that are always on, with weight 1")
    top: int = option(2, "experts per token of the others; 0: all", minimum=0)
    renormalise: bool = option(
        True, "the weights of those chosen add up to 1; else they are their probabilities, as in the paper"
    )
    balance_weight: float = option(0.001, "weight of the balance loss over the routed experts", minimum=0)


class SharedExperts(LearnedGate):
    """Weight 1 for the shared experts; p = softmax(W x) over the others, of which the `top` largest stay.

    What many tasks have in common goes to the shared experts, and the routed ones are free for what they have not. The
    router's rows of shared experts are not used. A token's weights add up to the number of shared experts plus 1.
    """

    Options = SharedExpertsOptions
    options: SharedExpertsOptions
    cost: ClassVar[str] = "joint training; a token O(e in) per site"
    source: ClassVar[str] = "DeepSeekMoE, arXiv:2401.06066"

    def __init__(self, options: SharedExpertsOptions, **given: Any) -> None:
        super().__init__(options, **given)
        for key in options.shared:
            if self.experts and key not in self.experts:
                raise unknown("shared expert", key, self.experts)

    def begin(self, widths: Mapping[str, int], experts: Sequence[GatedExpert], generator: torch.Generator) -> None:
        if not self.options.shared:
            raise BadInput("shared-experts has no shared expert", hint="name some with --gate-param shared=KEY,KEY")
        if set(self.experts) <= set(self.options.shared):
            raise BadInput("all experts are shared, which leaves nothing to route", hint="leave one out of `shared`")
        super().begin(widths, experts, generator)

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        import torch

        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_k

        places = [place for place, expert in enumerate(experts) if expert.key not in self.options.shared]
        device = device_of(experts)
        shared = torch.tensor([expert.key in self.options.shared for expert in experts], device=device)
        at = torch.tensor(places, dtype=torch.long, device=device)
        routed_columns = tuple(columns[place] for place in places)
        router = rows_of(self._tensor(module, "router", experts), routed_columns)
        top, renormalise = self.options.top, self.options.renormalise

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            weights = (allowed & shared).float().expand(*hidden.shape[:-1], -1)
            if not places:
                none = weights[..., :0]
                return Routing(weights, none, none.bool(), ())
            logits = logits_of(hidden, router(), None if bias is None else bias[..., at])
            may = allowed[..., at]
            probabilities = softmax_over(logits, may)
            chosen = top_k(logits, may, top)
            routed = softmax_over(logits, chosen) if renormalise else probabilities * chosen
            return Routing(weights.index_copy(-1, at, routed), probabilities, chosen, routed_columns)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {f"{site}.router": drawn(len(experts), width, self.options.init, generator)}

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        from xpert.experts.gates._learned_losses import switch_balance

        if not self.options.balance_weight or not routing.columns:
            return None
        return switch_balance(routing.probabilities, routing.chosen, mask) * self.options.balance_weight


PLUGIN = SharedExperts
