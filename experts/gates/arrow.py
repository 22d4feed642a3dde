"""The experts whose update stretches a token most, by its main input direction (Arrow); nothing is trained."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xpert.config import Config, option
from xpert.experts.gates._prototype_gate import PrototypeGate

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert, LowRankUpdate

__all__ = ["PLUGIN", "ArrowGate", "ArrowOptions", "top_right_singular_vectors"]


@dataclass(frozen=True)
class ArrowOptions(Config):
    top: int = option(3, "experts per token and module; 0: all", minimum=0)
    temperature: float = option(1.0, "of the softmax over the chosen", minimum=1e-6)


class ArrowGate(PrototypeGate):
    """logit_e = |x . v_e|, where v_e is the unit input direction that B_e A_e stretches most; softmax over the `top`.

    v_e [in], the top right singular vector of B_e A_e, is found per module from r x r matrices. Its sign means
    nothing, hence the absolute value. Ranks and modules of the experts may differ: an expert without the module is not
    chosen there, and one whose update is zero there has logit 0. A request's bias is added to the logits.
    """

    Options = ArrowOptions
    learned: ClassVar[str] = "none"
    cost: ClassVar[str] = "once O(r^2 (in + out)) per expert and module; a token O(e in) per module"
    source: ClassVar[str] = "Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157; mttl, peft create_arrow_model"

    def __init__(self, options: ArrowOptions, **given: Any) -> None:
        super().__init__(options, **given)
        self._known: MutableMapping[GatedExpert, dict[str, torch.Tensor]] | None = None

    def vectors(self, module: str, experts: Sequence[GatedExpert]) -> list[torch.Tensor | None]:
        """Found once per expert: kept as long as the expert lives, unless it is being trained."""
        from torch.utils.weak import WeakIdKeyDictionary

        if self._known is None:
            self._known = WeakIdKeyDictionary()
        found = [self._known.get(expert, {}).get(module) for expert in experts]
        missing = [i for i, expert in enumerate(experts) if found[i] is None and module in expert.modules]
        if missing:
            updates = [experts[i].modules[module] for i in missing]
            for i, update, vector in zip(missing, updates, top_right_singular_vectors(updates), strict=True):
                found[i] = vector
                if not (update.a.requires_grad or update.b.requires_grad):
                    self._known.setdefault(experts[i], {})[module] = vector
        return found

    def logits(self, hidden: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return (hidden.float() @ prototypes).abs()


def top_right_singular_vectors(updates: Sequence[LowRankUpdate]) -> torch.Tensor:
    """float32 [e, in]: the unit right singular vector of b a with the largest singular value; zeros where b a is 0.

    updates: e of one module, of any ranks. With a a^T = Q L Q^T, (b a)^T (b a) has the nonzero eigenvalues of
    L^(1/2) Q^T b^T b Q L^(1/2), whose top eigenvector u gives a^T (b^T b) Q L^(1/2) u: nothing larger than r x r is
    decomposed, and nothing is divided by a small L. In float64, since Gram matrices square the condition.
    """
    import torch

    rank = max(update.rank for update in updates)
    width, device = updates[0].a.shape[1], updates[0].a.device
    a = torch.zeros(len(updates), rank, width, dtype=torch.float64, device=device)
    gram = torch.zeros(len(updates), rank, rank, dtype=torch.float64, device=device)
    for index, update in enumerate(updates):  # rows of zeros below a lower rank change no product
        b = update.b.double()
        a[index, : update.rank] = update.a
        gram[index, : update.rank, : update.rank] = b.T @ b
    lengths, axes = torch.linalg.eigh(a @ a.mT)
    root = axes * lengths.clamp(min=0).sqrt().unsqueeze(-2)
    _, inner = torch.linalg.eigh(root.mT @ gram @ root)
    vectors = ((gram @ root @ inner[..., -1:]).mT @ a).squeeze(-2)
    norms = vectors.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, vectors / norms.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return unit.float()


PLUGIN = ArrowGate
