"""Experts made of random thin matrices, and every gate made ready for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from xpert import plugins
from xpert.experts.adapters import LowRank

WIDTH, OUTPUTS = 24, 20
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
# Key -> rank and modules: unequal ranks, and one expert that lacks a module that others have.
SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "a": (4, MODULES),
    "b": (2, MODULES),
    "c": (6, (MODULES[0], MODULES[2])),
    "d": (1, MODULES),
}

MIXTURES: dict[str, Callable[[Any, Sequence[Expert], Mapping[str, int]], dict[str, torch.Tensor]]] = {}
"""A gate learned for a mixture -> its router's tensors for these experts, given the width of each module's input.

Gates that draw untrained tensors themselves (`new_tensors`) need no entry.
"""


@dataclass(eq=False)
class Expert:
    """What gates may know of an expert."""

    key: str
    modules: dict[str, LowRank]
    gate_tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def make_expert(key: str, rank: int, modules: Sequence[str], *, seed: int, width: int = WIDTH) -> Expert:
    """Random updates, and vectors for every gate that keeps some with the expert."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    updates = {module: LowRank(draw(rank, width), draw(OUTPUTS, rank)) for module in modules}
    vectors = {f"{name}.{module}": draw(width) for name in ("phatgoose", "average-activation") for module in modules}
    return Expert(key, updates, vectors)


@pytest.fixture
def expert() -> Callable[..., Expert]:
    """`expert("a", 4, MODULES, seed=1)`."""
    return make_expert


@pytest.fixture
def experts() -> list[Expert]:
    return [make_expert(key, rank, modules, seed=ord(key)) for key, (rank, modules) in SHAPES.items()]


def _drawn(gate: Any, experts: Sequence[Expert], widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Untrained tensors of every module, large enough for weights to differ."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, torch.Tensor] = {}
    for module, width in widths.items():
        found |= gate.new_tensors(module, width, experts, generator)
    return {name: 20 * tensor if tensor.is_floating_point() else tensor for name, tensor in found.items()}


@pytest.fixture
def make_gate() -> Callable[..., Any]:
    """`make_gate("arrow", experts, top=2)`: a gate of that name, ready for these experts."""

    def make(name: str, experts: Sequence[Expert], **options: Any) -> Any:
        kind = plugins.load("gate", name)
        settings = kind.Options.from_mapping(options)
        if kind.learned != "mixture":
            return kind(settings)
        keys = [expert.key for expert in experts]
        widths = {module: update.a.shape[1] for e in experts for module, update in e.modules.items()}
        assert name in MIXTURES or hasattr(kind, "new_tensors"), f"say in MIXTURES how the router of {name} is made"
        tensors = MIXTURES.get(name, _drawn)(kind(settings, experts=keys), experts, widths)
        return kind(settings, tensors=tensors, experts=keys)

    return make
