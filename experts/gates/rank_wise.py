"""Every single rank is an expert: the best k ranks of all experts together share a token (SMoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.gates._learned import Decide, LearnedGate, Routing, device_of, drawn, joined, nowhere

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "RankWise", "RankWiseOptions"]


@dataclass(frozen=True)
class RankWiseOptions(Config):
    top: int = option(8, "ranks per token", minimum=1)
    weigh: str = option("softmax", "how the logits of the chosen ranks become weights", choices=("softmax", "sigmoid"))
    strength: float = option(
        1.0,
        "the weights are multiplied by this; the number of ranks chosen gives ready experts back their strength",
        minimum=0,
    )
    speed: float = option(0.001, "how far a training step moves the bias that balances the load; 0: none", minimum=0)
    init: float = option(0.02, "standard deviation of an untrained router's weights", minimum=0)


class RankWise(LearnedGate):
    """y = W x + B diag(g) A x, A and B being those of all experts one after another: R ranks, of which `top` are on.

    s = W_g x, the `top` largest of s + b are chosen, and g is the softmax of their s (or their sigmoid), times
    `strength`. b balances the load without a loss: after each training step b_i += speed sign(mean load - load_i). It
    decides who is chosen and never weighs. A request's bias on an expert counts for each of its ranks.
    """

    Options = RankWiseOptions
    options: RankWiseOptions
    grain: ClassVar[str] = "rank"
    cost: ClassVar[str] = "joint training; a token O(R in) per module, as much as the experts' A itself"
    source: ClassVar[str] = "SMoRA, arXiv:2501.15103; loss-free balance, arXiv:2408.15664"

    def __init__(self, options: RankWiseOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._load: dict[str, torch.Tensor] = {}

    def site(self, module: str) -> str:
        return module

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        import torch

        from xpert.experts.gates._learned_choice import logits_of, softmax_over, top_k

        inside = [(place, column) for place, column in enumerate(columns) if module in experts[place].modules]
        router = joined([self._part(module, "router", place, column, experts) for place, column in inside])
        biases = [self._part(module, "balance", place, column, experts) for place, column in inside]
        ranks = [experts[place].modules[module].rank for place, _ in inside]
        of_rank = [place for (place, _), rank in zip(inside, ranks, strict=True) for _ in range(rank)]
        owner = torch.tensor(of_rank, dtype=torch.long, device=device_of(experts))
        options = self.options

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            logits = logits_of(hidden, router(), None if bias is None else bias[..., owner])
            may = allowed[..., owner]
            chosen = top_k(logits + torch.cat(biases), may, options.top)
            if options.weigh == "softmax":
                weights = softmax_over(logits, chosen)
            else:
                weights = torch.sigmoid(logits) * chosen
            return Routing(weights * options.strength, softmax_over(logits, may), chosen, columns)

        return decide

    def _decide_here(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        if not any(module in expert.modules for expert in experts):
            return nowhere(columns, 0)  # an expert without the module has no rank there
        return self._decide(module, columns, experts)

    def _part(self, module: str, part: str, place: int, column: int, experts: Sequence[GatedExpert]) -> torch.Tensor:
        """The rows of one expert's ranks."""
        tensor = self._tensor(module, f"{part}.{column}", experts)
        rank = experts[place].modules[module].rank
        if len(tensor) != rank:
            raise BadInput(
                f"the rank-wise gate was trained for {len(tensor)} ranks of expert {experts[place].key!r} in {module}, "
                f"which has {rank}",
                hint="use the experts it was trained with",
            )
        return tensor

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        import torch

        found = {}
        for place, expert in enumerate(experts):
            if site in expert.modules:
                rank = expert.modules[site].rank
                found[f"{site}.router.{place}"] = drawn(rank, width, self.options.init, generator)
                found[f"{site}.balance.{place}"] = torch.zeros(rank)
        return found

    def trains(self, name: str) -> bool:
        return ".balance." not in name

    def observe(self, site: str, routing: Routing, mask: torch.Tensor) -> None:
        load = routing.chosen[mask].sum(0).float()
        self._load[site] = self._load.get(site, 0) + load

    def after_step(self) -> None:
        import torch

        with torch.no_grad():
            for site, load in self._load.items():
                step, start = self.options.speed * torch.sign(load.mean() - load), 0
                for place in range(len(self.experts)):
                    balance = self.tensors.get(f"{site}.balance.{place}")
                    if balance is not None:
                        balance += step[start : start + len(balance)]
                        start += len(balance)
        self._load = {}


PLUGIN = RankWise
