"""Arrow beside peft's own, where ranks and modules are equal, which peft needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xpert import plugins
from xpert.experts.adapters import Adapter, read_adapter
from xpert.experts.gate_training import expert_applied
from xpert.language_model import load_model

KEYS = ("a", "b", "c", "d")
TOP, TEMPERATURE = 2, 0.8


@pytest.fixture(scope="module")
def folders(make_adapter: Callable[..., Path]) -> list[Path]:
    """Adapters whose updates have one direction well above the others: peft's 15 power iterations must find it."""
    made = [make_adapter(seed=ord(key), scale=0.1, lora_alpha=6) for key in KEYS]
    for folder in made:
        weights = load_file(folder / "adapter_model.safetensors")
        for name, tensor in weights.items():
            if "lora_A" in name:
                tensor[0] *= 10
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, folders: list[Path]) -> list[Adapter]:
    lm = load_model(str(tiny_base), device="cpu")
    return [read_adapter(key, folder, lm) for key, folder in zip(KEYS, folders, strict=True)]


@pytest.fixture(scope="module")
def peft_model(tiny_base: Path, folders: list[Path]) -> Any:
    from peft import ArrowConfig, create_arrow_model
    from transformers import AutoModelForCausalLM

    config = ArrowConfig(top_k=TOP, router_temperature=TEMPERATURE, rng_seed=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    return create_arrow_model(base, [str(folder) for folder in folders], config).eval()


def test_the_logits_of_a_whole_model_are_peft_s(tiny_base: Path, adapters: list[Adapter], peft_model: Any) -> None:
    kind = plugins.load("gate", "arrow")
    gate = kind(kind.Options(top=TOP, temperature=TEMPERATURE))
    model = load_model(str(tiny_base), device="cpu").model
    allowed = torch.ones(2, 1, 4, dtype=torch.bool)
    hooks = []
    for name in adapters[0].modules:
        weigh = gate.at(name, adapters)

        def add(_: Any, given: Any, output: Any, name: str = name, weigh: Any = weigh) -> Any:
            weights = weigh(given[0], allowed, None)
            for index, adapter in enumerate(adapters):
                update = adapter.modules[name]
                output = output + weights[..., index : index + 1] * (given[0] @ update.a.T @ update.b.T)
            return output

        hooks.append(model.get_submodule(name).register_forward_hook(add))
    ids = torch.arange(3, 63).view(2, 30)
    with torch.inference_mode():
        ours, theirs = model(ids).logits, peft_model(ids).logits
        for hook in hooks:
            hook.remove()
        with expert_applied(model, adapters[0].modules):
            alone = model(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert not torch.allclose(ours, alone, atol=0.1)


def test_the_prototypes_are_peft_s(tiny_base: Path, adapters: list[Adapter], peft_model: Any) -> None:
    kind = plugins.load("gate", "arrow")
    gate = kind(kind.Options())
    with torch.inference_mode():
        peft_model(torch.tensor([[5, 6]]))  # peft finds them in its first pass
    base = peft_model.get_base_model()
    for name in adapters[0].modules:
        theirs = base.get_submodule(name).lora_arrow["arrow_router"].prototypes
        ours = torch.stack(gate.vectors(name, adapters))
        cosines = (ours * theirs).sum(-1).abs()
        assert torch.allclose(cosines, torch.ones(4), atol=1e-4), name
