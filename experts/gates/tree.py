"""Binary trees whose smooth splits close off experts exactly: k trees lead a token to few leaves (COMET)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xpert.config import option
from xpert.experts.gates._learned import Decide, LearnedGate, RouterOptions, Routing, device_of, drawn

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert

__all__ = ["PLUGIN", "Tree", "TreeOptions"]


@dataclass(frozen=True)
class TreeOptions(RouterOptions):
    trees: int = option(2, "trees; a token reaches as many experts at most, once all splits have closed", minimum=1)
    band: float = option(1.0, "splits are soft where |w x| is below half of this, and closed outside", minimum=1e-3)
    entropy_weight: float = option(0.01, "weight of the leaves' entropy, which closes splits in training", minimum=0)


class Tree(LearnedGate):
    """In each tree a node sends the share S(w x) to the right and the rest to the left; a leaf is an expert.

    S is the smooth step -2 t^3 / band^3 + 3 t / (2 band) + 1/2 inside the band and exactly 0 or 1 outside, so weights
    become exactly 0. Each tree's weights add up to 1, and the gate is the mean of the trees. Trees have any number of
    leaves; the first has the experts in their order, the others in one drawn from the seed, which keeps neighbours of
    one tree apart in another (the published search over permutations is not made). A subtree in which no expert is
    allowed is never entered. A request's bias multiplies an expert's weight by exp(bias), all then adding up to 1.
    """

    Options = TreeOptions
    options: TreeOptions
    part: ClassVar[str] = "splits"
    cost: ClassVar[str] = "joint training; a token O(trees e in) per site"
    source: ClassVar[str] = "COMET, Ibrahim et al. 2023, arXiv:2306.02824"

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        import torch

        from xpert.experts.gates._learned_choice import logits_of
        from xpert.experts.gates._learned_trees import leaf_shares, reweighed, smooth_step

        splits = self._tensor(module, "splits", experts)
        leaves = self._tensor(module, "leaves", experts).long()  # [trees, e]: the expert of each leaf
        trees, count = leaves.shape
        leaf_of = leaves.argsort(dim=1)
        own = torch.tensor(columns, dtype=torch.long, device=device_of(experts))
        band = self.options.band

        def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            open_ = allowed.new_zeros((*allowed.shape[:-1], count)).index_copy(-1, own, allowed)
            shares = smooth_step(logits_of(hidden, splits, None), band).view(*hidden.shape[:-1], trees, count - 1)
            found = leaf_shares(shares, open_[..., leaves])
            by_expert = found.gather(-1, leaf_of.expand(found.shape))
            weights = by_expert.mean(-2)[..., own] * allowed
            if bias is not None:
                weights = reweighed(weights, bias)
            return Routing(weights, weights, weights > 0, columns, inner=found)

        return decide

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        import torch

        count, trees = len(experts), self.options.trees
        orders = [torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(trees - 1))]
        return {
            f"{site}.splits": drawn(trees * (count - 1), width, self.options.init, generator),
            f"{site}.leaves": torch.stack(orders),
        }

    def trains(self, name: str) -> bool:
        return not name.endswith(".leaves")

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        from xpert.experts.gates._learned_losses import entropy

        if not self.options.entropy_weight or routing.inner is None:
            return None
        return entropy(routing.inner, mask) * self.options.entropy_weight


PLUGIN = Tree
