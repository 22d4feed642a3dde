"""Reading peft folders: what is served, and what is refused by which name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.experts.adapters import read_adapter
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.registry.card import BaseModel, ExpertCard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_ranks_and_scales_are_pefts(lm: LanguageModel, folders: dict[str, Path], plain: Callable[..., Any]) -> None:
    import torch

    for key, folder in folders.items():
        adapter = read_adapter(key, folder, lm)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in plain(key).named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
        }
        assert adapter.modules.keys() == layers.keys()
        for name, part in adapter.modules.items():
            assert torch.allclose(part.b @ part.a, layers[name].get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "IA3 adapters are not served"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    lm: LanguageModel, copy: Path, changes: dict[str, Any], name: str
) -> None:
    change_config(copy, **changes)
    with pytest.raises(BadInput, match=name) as caught:
        read_adapter("x", copy, lm)
    assert str(copy) in str(caught.value)


def test_real_dora_and_saved_modules_of_peft(lm: LanguageModel, make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="DoRA and fully trained modules"):
        read_adapter("x", make_adapter(use_dora=True, modules_to_save=["lm_head"]), lm)
    with pytest.raises(BadInput, match=r"embed_tokens.* is LoRA on an embedding"):
        read_adapter("x", make_adapter(target_modules=["embed_tokens", "q_proj"]), lm)


def spoil(key: str, value: Callable[[Any], Any]) -> Callable[[Path], None]:
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{key}.weight"
    return lambda folder: change_weights(folder, lambda weights: weights.update({name: value(weights[name])}))


def drop_b(folder: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        del weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]

    change_weights(folder, change)


def rename(folder: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        for side in "AB":
            old = f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"
            weights[old.replace("layers.1", "layers.7")] = weights.pop(old)

    change_weights(folder, change)


def stray(folder: Path) -> None:
    import torch

    change_weights(folder, lambda w: w.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def card_of_another_base(folder: Path) -> None:
    ExpertCard(base=BaseModel("other/model", "feedc0ffee99" * 4), adapter={}).write(folder)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), NotFound, "has no adapter_config.json"),
        (lambda f: (f / WEIGHTS).unlink(), NotFound, "has no adapter_model.safetensors"),
        (lambda f: shutil.rmtree(f), NotFound, "no such adapter folder"),
        (lambda f: (f / CONFIG).write_text("{"), Corrupt, "not valid JSON"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 100), Corrupt, "the weights are damaged"),
        (spoil("lora_A", lambda t: t.fill_(float("nan"))), Corrupt, "q_proj holds NaN or infinite"),
        (spoil("lora_B", lambda t: t.fill_(float("inf"))), Corrupt, "q_proj holds NaN or infinite"),
        (spoil("lora_A", lambda t: t[:, :32].contiguous()), BadInput, r"A \[4, 32\] .* it maps 64 to 64"),
        (spoil("lora_A", lambda t: t[:0].contiguous()), Corrupt, "rank zero"),
        (drop_b, Corrupt, "up_proj has lora_A alone"),
        (rename, BadInput, "layers.7.mlp.up_proj, which the base model"),
        (stray, BadInput, "lm_head.weight is a weight that is not plain LoRA"),
        (pickled, BadInput, "pickle"),
        (card_of_another_base, BadInput, r"trained on other/model \(feedc0ffee99\), but the base model is .*tiny-base"),
    ],
)
def test_spoiled_folders(
    engine: TorchEngine, copy: Path, change: Callable[[Path], Any], kind: type[XpertError], message: str
) -> None:
    change(copy)
    known = engine.experts
    with pytest.raises(kind, match=message) as caught:
        engine.add_expert("spoiled", copy)
    assert type(caught.value) is kind and str(copy) in str(caught.value)
    assert engine.experts == known


def test_a_card_of_this_base_is_accepted(engine: TorchEngine, copy: Path) -> None:
    ExpertCard(base=BaseModel(engine.lm.ref, engine.lm.fingerprint), adapter={}).write(copy)
    engine.add_expert("own", copy)
    assert "own" in engine.experts
