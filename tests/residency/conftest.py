"""A stand-in base with small linear layers, adapters for it by the thousand, and banks driven step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xpert.experts.adapters import Adapter
from xpert.experts.engines._bank import AdapterBank, ResidencyOptions

MODULES = {"up": (64, 96), "down": (96, 64)}
"""Module -> (inputs, outputs) of the stand-in base."""


def _layers() -> Any:
    return torch.nn.ModuleDict({name: torch.nn.Linear(*shape, bias=False) for name, shape in MODULES.items()})


@dataclass(eq=False)
class StandIn:
    """What the bank needs of a `LanguageModel`."""

    model: Any = field(default_factory=_layers)
    ref: str = "stand-in"
    fingerprint: str = "none"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


class SteppedBank(AdapterBank):
    """A bank whose loading happens when the test says so: `step()` does what the background thread does once."""

    def _start(self) -> None:
        pass

    def step(self) -> bool:
        return self._load_next()

    def load_all(self, most: int = 1000) -> int:
        steps = 0
        while self.step():
            steps += 1
            assert steps < most, "loading never ends"
        return steps


@pytest.fixture(scope="session")
def base() -> StandIn:
    return StandIn()


def write_adapter(folder: Path, seed: int, *, rank: int = 2, scale: float = 0.3, **config: Any) -> Path:
    """A peft folder for the stand-in base; overwritten in place where it exists."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in MODULES.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = scale * torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = scale * torch.randn(outputs, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "stand-in"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def stepped(base: StandIn) -> Callable[..., SteppedBank]:
    """`stepped(device_experts=2)`: a bank the test drives; for tests of many examples, which close it themselves."""

    def make(*, on_evict: Callable[[Adapter], None] | None = None, **options: Any) -> SteppedBank:
        return SteppedBank(base, ResidencyOptions(**options), on_evict=on_evict)

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int = 0, **settings: Any) -> Path:
        return write_adapter(tmp_path / name, seed, **settings)

    return make


@pytest.fixture(scope="session")
def many_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve adapters of ranks 1 to 3."""
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / f"e{index}", index, rank=1 + index % 3) for index in range(12)]


@pytest.fixture
def make_bank(base: StandIn) -> Iterator[Callable[..., Any]]:
    """`make_bank(device_experts=2)`: a bank that loads in its thread; `stepped=True`: one the test drives."""
    made: list[AdapterBank] = []

    def make(
        *, stepped: bool = False, on_evict: Callable[[Adapter], None] | None = None, **options: Any
    ) -> AdapterBank:
        kind = SteppedBank if stepped else AdapterBank
        made.append(kind(base, ResidencyOptions(**options), on_evict=on_evict))
        return made[-1]

    yield make
    for bank in made:
        bank.close()


@pytest.fixture(scope="session")
def lm_on_cpu(tiny_base: Path) -> Any:
    """The tiny model as a `LanguageModel`."""
    from xpert.language_model import load_model

    return load_model(str(tiny_base), device="cpu")
