"""A base model whose linear layers add the updates of several experts, weighed by a gate; experts and gate can learn.

    y = W x + B diag(w) A x          A and B those of all experts one after another, w each token's weight of each rank

W is frozen. The gate is the one that serves (`experts/gates`): its tensors are this model's parameters while it trains.
This module imports torch; it is itself imported only once training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from xpert.errors import BadInput
from xpert.experts.adapters import linear_shape
from xpert.experts.gates._learned import Decide, LearnedGate, Routing

__all__ = ["JointModel", "JointUpdate", "ReadyExpert"]

STATE_FILE = "mixture.safetensors"


@dataclass(eq=False)
class JointUpdate:
    """One expert's A [rank, in] and B [out, rank] in one module, float32, and the scale of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(eq=False)
class ReadyExpert:
    """An expert as gates know it (`protocols.GatedExpert`), with parameters for matrices."""

    key: str
    modules: dict[str, JointUpdate]
    gate_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


Parts = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Module -> (A, B, scale) of an expert."""


class JointModel:
    """The experts and the gate of a mixture, built into `model` in place.

    experts: key -> parts, in the gate's order; a gate without tensors is begun with `generator`. Raises BadInput where
    nothing is left to train, and where the gate does not fit the experts.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Mapping[str, Parts],
        gate: LearnedGate,
        *,
        dropout: float = 0.0,
        freeze_experts: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.gate, self.freeze_experts = model, gate, freeze_experts
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        device = next(model.parameters()).device
        self.experts = [
            ReadyExpert(key, {name: self._update(part, device) for name, part in parts.items()})
            for key, parts in experts.items()
        ]
        widths = {name: shape[0] for name, part in model.named_modules() if (shape := linear_shape(part))}
        if not gate.tensors:
            gate.begin(widths, self.experts, generator or torch.Generator().manual_seed(gate.seed))
        gate.tensors = {
            name: nn.Parameter(tensor.to(device).float()) if gate.trains(name) else tensor.to(device)
            for name, tensor in gate.tensors.items()
        }
        if freeze_experts and not any(tensor.requires_grad for tensor in gate.tensors.values()):
            raise BadInput(f"gate {gate.name} has nothing to train, and the experts are frozen")
        self._hidden: dict[str, torch.Tensor] = {}
        self._routings: dict[str, Routing] = {}
        self._decides: dict[str, tuple[int, Decide]] = {}
        self._install(widths, dropout)

    def _update(self, part: tuple[torch.Tensor, torch.Tensor, float], device: torch.device) -> JointUpdate:
        a, b = (nn.Parameter(tensor.to(device), requires_grad=not self.freeze_experts) for tensor in part[:2])
        return JointUpdate(a, b, part[2])

    def _install(self, widths: Mapping[str, int], dropout: float) -> None:
        adapted = [name for name in widths if any(name in expert.modules for expert in self.experts)]
        read = set()
        for name in adapted:
            site = self.gate.site(name)
            if site != name:
                read.add(site)
            held = [expert for expert in self.experts if self.gate.holds(expert, site)]
            if site not in self._decides:
                self._decides[site] = len(held), self.gate.decide(site, held)
            updates = {place: e.modules[name] for place, e in enumerate(held) if name in e.modules}
            parent, _, last = name.rpartition(".")
            layer = JointLinear(
                name, self.model.get_submodule(name), updates, self.weights, dropout, self.gate.grain == "rank"
            )
            layer.train(self.model.training)
            setattr(self.model.get_submodule(parent), last, layer)
        for site in read:
            self.model.get_submodule(site).register_forward_pre_hook(self._keep(site))
        self.model.register_forward_pre_hook(self._new_pass)
        learned = [tensor for tensor in self.gate.tensors.values() if isinstance(tensor, nn.Parameter)]
        self.model.register_module("xpert_gate", nn.ParameterList(learned))  # so that the optimizer finds them

    # ── a pass ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_pass(self, *_: Any) -> None:
        self._hidden, self._routings = {}, {}

    def _keep(self, site: str) -> Callable[..., None]:
        def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            self._hidden[site] = given[0]

        return keep

    def weights(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """float32 [rows, tokens, e or R] of the experts that the site of `name` has; it decides once a pass."""
        site = self.gate.site(name)
        if site not in self._routings:
            hidden = x if site == name else self._hidden[site]
            experts, decide = self._decides[site]
            allowed = torch.ones(len(hidden), 1, experts, dtype=torch.bool, device=hidden.device)
            with torch.autocast(hidden.device.type, enabled=False):
                self._routings[site] = decide(hidden, allowed, None)
        return self._routings[site].weights

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────

    def loss(self, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        """The gate's own loss of the pass just made, summed over sites; mask [rows, tokens] without padding."""
        found = [self.gate.loss(routing, mask, kinds) for routing in self._routings.values()]
        kept = [loss for loss in found if loss is not None]
        return torch.stack(kept).sum() if kept else None

    def observe(self, mask: torch.Tensor) -> None:
        """Tells the gate how the pass just made was routed."""
        with torch.no_grad():
            for site, routing in self._routings.items():
                self.gate.observe(site, routing, mask)

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes or draws, by name: the gate's tensors, and the experts' unless they are frozen."""
        found = {f"gate.{name}": tensor for name, tensor in self.gate.tensors.items()}
        if not self.freeze_experts:
            for place, expert in enumerate(self.experts):
                for name, update in expert.modules.items():
                    found |= {f"experts.{place}.{name}.A": update.a, f"experts.{place}.{name}.B": update.b}
        return found

    def save(self, folder: Path) -> None:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained().items()}
        save_file(kept, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Puts back what `save` wrote, in place."""
        found = load_file(folder / STATE_FILE)
        with torch.no_grad():
            for name, tensor in self.trained().items():
                tensor.copy_(found[name])


class JointLinear(nn.Module):
    """A linear layer with several updates, by place among the experts its gate weighs (`by_rank`: their ranks).

    One dropout mask for all of them, as in LoRAMoE.
    """

    _expert_of: torch.Tensor
    _scale: torch.Tensor

    def __init__(
        self,
        name: str,
        base: nn.Module,
        updates: Mapping[int, JointUpdate],
        weights: Callable[[str, torch.Tensor], torch.Tensor],
        dropout: float,
        by_rank: bool,
    ) -> None:
        super().__init__()
        self.name, self.base, self.dropout, self.by_rank = name, base, dropout, by_rank
        self.a = nn.ParameterList([update.a for update in updates.values()])
        self.b = nn.ParameterList([update.b for update in updates.values()])
        self._weights = weights
        place = [place for place, update in updates.items() for _ in range(update.rank)]
        scale = [update.scale for update in updates.values() for _ in range(update.rank)]
        device = self.a[0].device
        self.register_buffer("_expert_of", torch.tensor(place, device=device), persistent=False)
        self.register_buffer("_scale", torch.tensor(scale, device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if x.ndim != 3:
            raise BadInput(
                f"{self.name} of the base model gets {list(x.shape)}, in which rows cannot be told apart",
                hint="use experts without that module among their target_modules",
            )
        weights = self._weights(self.name, x)
        if not self.by_rank:
            weights = weights[..., self._expert_of]
        a, b = torch.cat(list(self.a)), torch.cat(list(self.b), dim=1)
        inputs = functional.dropout(x.to(a.dtype), self.dropout, self.training)
        h = functional.linear(inputs, a) * (weights * self._scale)
        return y + functional.linear(h, b).to(y.dtype)
