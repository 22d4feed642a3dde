"""What gates learned for a mixture share: a router for a fixed list of experts, where it is asked, how it is trained.

A router's tensors are named "SITE.PART", SITE being the module whose input it reads. They may be `nn.Parameter`s: the
class that serves a router is the class that trains it. Routers compute in float32 whatever the base computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert, ModuleGate

__all__ = ["Decide", "LearnedGate", "RouterOptions", "Routing", "device_of", "drawn", "joined", "nowhere", "rows_of"]

# The layers of a feed-forward block by the names architectures give them; those that read its input come first.
_ENTRIES = ("gate_proj", "gate_up_proj", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1")
_FEED_FORWARD = {*_ENTRIES, "down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2", "w3"}


@dataclass(frozen=True)
class RouterOptions(Config):
    """What most routers take."""

    per: str = option(
        "layer", "what is routed on its own: each layer, or each feed-forward block as one", choices=("layer", "block")
    )
    init: float = option(0.02, "standard deviation of an untrained router's weights", minimum=0)


@dataclass(frozen=True)
class Routing:
    """What a router says of tokens.

    weights [rows, tokens, e] as a `ModuleGate` gives them; probabilities [rows, tokens, c] over all choices before any
    is left out, and chosen, bool, of the same shape (c is e, and the null experts where a gate has them); columns: the
    experts' places in the router's order. `inner` is what a gate's own loss reads besides.
    """

    weights: torch.Tensor
    probabilities: torch.Tensor
    chosen: torch.Tensor
    columns: tuple[int, ...]
    inner: torch.Tensor | None = None


Decide = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None"], Routing]
"""As a `ModuleGate`, with all that training reads."""


class LearnedGate:
    """Base of the gates of kind "mixture". A gate implements `_decide` and `new_tensors`, and what it trains by."""

    Options: ClassVar[type[Config]]
    learned: ClassVar[str] = "mixture"
    grain: ClassVar[str] = "expert"
    part: ClassVar[str] = "router"
    """The tensor by which a module is known to be a site."""

    def __init__(
        self,
        options: Any,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        experts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.options = options
        self.tensors: dict[str, torch.Tensor] = dict(tensors or {})
        self.experts = tuple(experts)
        self.seed = seed
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise BadInput(f"{name} of the {self.name} gate holds NaN or infinite numbers")

    @property
    def name(self) -> str:
        """The plug-in's name."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    # ── use ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def site(self, module: str) -> str:
        """The module whose input decides for `module`: itself, or its feed-forward block's first layer."""
        return self._site(module, lambda name: f"{name}.{self.part}" in self.tensors)

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        """The gate of one module; raises BadInput for an expert or a module that the router was not trained for."""
        import torch

        decide = self.decide(module, experts)
        if module == self.site(module) or all(module in expert.modules for expert in experts):
            return lambda hidden, allowed, bias: decide(hidden, allowed, bias).weights
        has = torch.tensor([module in expert.modules for expert in experts], device=device_of(experts))
        return lambda hidden, allowed, bias: decide(hidden, allowed, bias).weights * has

    def decide(self, module: str, experts: Sequence[GatedExpert]) -> Decide:
        """As `at`, with the probabilities and choices that losses are made of."""
        import torch

        with torch.inference_mode(False):  # what is made here may be used under autograd, wherever it is made
            return self._decide_here(module, self._columns(experts), experts)

    def _decide_here(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        import torch

        held = [self.holds(expert, module) for expert in experts]
        if not any(held):
            return nowhere(columns)
        inner = self._decide(module, columns, experts)
        if all(held):
            return inner
        mask = torch.tensor(held, device=device_of(experts))
        return lambda hidden, allowed, bias: inner(hidden, allowed & mask, bias)

    def holds(self, expert: GatedExpert, module: str) -> bool:
        """Whether `module`'s site has this expert to choose: it changes a layer that the site decides for.

        A block is decided as one: an expert that lacks one of its layers may be chosen, and then does nothing there.
        """
        site = self.site(module)
        parent, dot, _ = site.rpartition(".")
        beside = [f"{parent}{dot}{name}" for name in sorted(_FEED_FORWARD)] if self._by_block() else []
        return site in expert.modules or any(name in expert.modules and self.site(name) == site for name in beside)

    def _decide(self, module: str, columns: tuple[int, ...], experts: Sequence[GatedExpert]) -> Decide:
        raise NotImplementedError

    def _columns(self, experts: Sequence[GatedExpert]) -> tuple[int, ...]:
        places = {key: place for place, key in enumerate(self.experts)}
        for expert in experts:
            if expert.key not in places:
                raise BadInput(
                    f"the {self.name} gate was not trained for expert {expert.key!r}",
                    hint=f"it knows {', '.join(self.experts) or 'none'}; train it again with `xpert train --mixture`",
                )
        return tuple(places[expert.key] for expert in experts)

    def _tensor(self, module: str, part: str, experts: Sequence[GatedExpert]) -> torch.Tensor:
        """A tensor of the module's site, on the experts' device."""
        name = f"{self.site(module)}.{part}"
        if name not in self.tensors:
            raise BadInput(
                f"the {self.name} gate was not trained for {module}",
                hint="use the experts it was trained with, or train it again with `xpert train --mixture`",
            )
        return self.tensors[name].to(device_of(experts))

    def _site(self, module: str, known: Callable[[str], bool]) -> str:
        parent, dot, last = module.rpartition(".")
        if self._by_block() and last in _FEED_FORWARD:
            for entry in _ENTRIES:
                if known(f"{parent}{dot}{entry}"):
                    return f"{parent}{dot}{entry}"
        return module

    def _by_block(self) -> bool:
        return bool(getattr(self.options, "per", "layer") == "block")

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, widths: Mapping[str, int], experts: Sequence[GatedExpert], generator: torch.Generator) -> None:
        """Makes the tensors of an untrained router. `widths`: inputs of every linear layer of the base, in its order.

        Raises BadInput where the options do not fit the experts.
        """
        adapted = {module for expert in experts for module in expert.modules}
        sites = {self._site(module, widths.__contains__): None for module in widths if module in adapted}
        for site in sites:
            self.tensors |= self.new_tensors(site, widths[site], experts, generator)

    def new_tensors(
        self, site: str, width: int, experts: Sequence[GatedExpert], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """The untrained tensors of one site, by full name, float32 on the CPU."""
        raise NotImplementedError

    def trains(self, name: str) -> bool:
        """Whether gradients change this tensor; the others are drawn once, or moved by `after_step`."""
        return True

    def row_kinds(self, skills: Sequence[str | None]) -> list[int] | None:
        """The kind of each training row, by its skill, where the gate's loss reads it."""
        return None

    def loss(self, routing: Routing, mask: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the language model's loss for one site of one batch; None where nothing is.

        mask [rows, tokens]: True for real tokens; kinds [rows] of the localised loss.
        """
        return None

    def observe(self, site: str, routing: Routing, mask: torch.Tensor) -> None:
        """Once per site and training batch, before `after_step`."""

    def before_step(self, done: int, planned: int) -> None:
        """Called before each optimizer step with the number of steps done."""

    def after_step(self) -> None:
        """Called after each optimizer step."""


def device_of(experts: Sequence[GatedExpert]) -> torch.device | None:
    """Where the experts lie; None, which torch takes for the CPU, for experts without any module."""
    return next((update.a.device for expert in experts for update in expert.modules.values()), None)


def nowhere(columns: tuple[int, ...], choices: int | None = None) -> Decide:
    """The gate of a module that no expert changes: weight 0 for all."""

    def decide(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> Routing:
        width = len(columns) if choices is None else choices
        weights = hidden.new_zeros((*hidden.shape[:-1], width)).float()
        return Routing(weights, weights, weights.bool(), columns)

    return decide


def rows_of(tensor: torch.Tensor, columns: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """The rows of a router for these experts: taken once, or at every call where gradients flow through them."""
    import torch

    if columns == tuple(range(len(tensor))):
        return lambda: tensor
    index = torch.tensor(columns, dtype=torch.long, device=tensor.device)
    if tensor.requires_grad:
        return lambda: tensor[index]
    kept = tensor[index]
    return lambda: kept


def joined(tensors: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The tensors one after another: put together once, or at every call where gradients flow through them."""
    import torch

    if any(tensor.requires_grad for tensor in tensors):
        return lambda: torch.cat(list(tensors))
    kept = torch.cat(list(tensors))
    return lambda: kept


def drawn(rows: int, width: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """[rows, width] float32 from N(0, std^2)."""
    import torch

    return torch.randn(rows, width, generator=generator) * std
