"""Experts are switched on by each request and weigh what it says, everywhere or in named modules and layers (MoTE)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput

if TYPE_CHECKING:
    import torch

    from xpert.protocols import GatedExpert, ModuleGate

__all__ = ["PLUGIN", "SwitchesGate", "SwitchesOptions"]


@dataclass(frozen=True)
class SwitchesOptions(Config):
    modules: tuple[str, ...] = option(
        ("*",), "modules in which experts act: names or ends of names, with * (q_proj, self_attn.*)"
    )
    layers: tuple[str, ...] = option((), "layers in which experts act, counted from 0: 3 or 0-11; by default all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modules or not all(self.modules):
            raise BadInput("modules is empty", hint="write * for all, or names such as q_proj,mlp.*")
        for text in self.layers:
            _range(text)

    def acts_in(self, module: str) -> bool:
        """Whether experts act in a module; with `layers`, one outside all layers is none of them."""
        if not any(fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}") for pattern in self.modules):
            return False
        if not self.layers:
            return True
        layer = next((int(part) for part in module.split(".") if part.isdigit()), None)
        return layer is not None and any(layer in _range(text) for text in self.layers)


class SwitchesGate:
    """Weight 1 for every expert that the request names, at every token; its strengths are multiplied by the engine.

    With `modules` and `layers`, experts act in those alone, and an expert that has no module among them is refused,
    since it could never act. There are no logits here, so a bias changes nothing.
    """

    Options = SwitchesOptions
    learned: ClassVar[str] = "none"
    grain: ClassVar[str] = "expert"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "after Mixture of Tunable Experts, Dahlke et al. 2025, https://arxiv.org/abs/2502.11096"

    def __init__(
        self,
        options: SwitchesOptions,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        experts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.options = options
        self._acts_in = cache(options.acts_in)

    def site(self, module: str) -> str:
        return module

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        import torch

        from xpert.experts.gates._choosing import all_allowed

        for expert in experts:
            if not any(map(self._acts_in, expert.modules)):
                raise BadInput(
                    f"expert {expert.key!r} adapts no module that the gate switches on, so it could never act",
                    hint=f"widen its modules or layers; the expert has {', '.join(_ends(expert))}",
                )
        acts = [self._acts_in(module) and module in expert.modules for expert in experts]
        if all(acts):
            return lambda hidden, allowed, bias: all_allowed(hidden, allowed)
        given = next((e.modules[module].a.device for e in experts if module in e.modules), None)
        switched = torch.tensor(acts, dtype=torch.bool, device=given)
        return lambda hidden, allowed, bias: all_allowed(hidden, allowed & switched.to(hidden.device))


@cache
def _range(text: str) -> range:
    """`3` or `0-11` as layer numbers."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise BadInput(f"layers {text!r} is not understood", hint="write numbers and ranges, such as 0,4-11")
    return range(first, last + 1)


def _ends(expert: GatedExpert) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in expert.modules})


PLUGIN = SwitchesGate
