"""The model that is trained is the mixture that is served: equal to peft for one expert, to the written sum for two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from xpert import plugins
from xpert.experts.adapters import read_adapter, read_parts
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.experts.mixture_training_layers import JointModel
from xpert.language_model import LanguageModel, load_model
from xpert.protocols import EngineRequest

IDS = torch.arange(3, 43).view(2, 20)


def _joint(lm: LanguageModel, folders: dict[str, Path], name: str = "softmax-top-k", **options: Any) -> JointModel:
    kind = plugins.load("gate", name)
    gate = kind(kind.Options.from_mapping(options), experts=tuple(folders))
    return JointModel(lm.model, {key: read_parts(folder) for key, folder in folders.items()}, gate)


@pytest.mark.parametrize("key", ["sums", "words"])
def test_one_expert_is_the_plain_lora(key: str, ready: dict[str, Path], lm: LanguageModel, tiny_base: Path) -> None:
    _joint(lm, {key: ready[key]})
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), ready[key])
    with torch.no_grad():
        assert torch.allclose(lm.model(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_routers_of_zeros_give_half_of_each(ready: dict[str, Path], lm: LanguageModel, tiny_base: Path) -> None:
    joint = _joint(lm, ready, init=0.0)
    with torch.no_grad():
        found = lm.model(IDS).logits
    base = load_model(str(tiny_base), device="cpu")
    adapters = [read_adapter(key, folder, base) for key, folder in ready.items()]
    with torch.no_grad():
        for name in {module for adapter in adapters for module in adapter.modules}:
            members = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
            layer = base.model.get_submodule(name)
            layer.weight += sum(part.b @ part.a for part in members) / len(members)
        assert torch.allclose(found, base.model(IDS).logits, atol=1e-5)
    assert {routing.weights.shape[-1] for routing in joint._routings.values()} == {
        1,
        2,
    }  # a module of one expert is that expert's own


@pytest.mark.parametrize("name", ["rank-wise", "tree", "null-experts"])
def test_the_rank_form_equals_a_sum_over_experts(name: str, ready: dict[str, Path], lm: LanguageModel) -> None:
    joint = _joint(lm, ready, name, init=0.5)
    module = "model.layers.0.self_attn.q_proj"
    layer: Any = lm.model.get_submodule(module)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(x)
        weights = joint.weights(module, x)
        expected, start = layer.base(x), 0
        for place, expert in enumerate(joint.experts):
            update = expert.modules[module]
            for rank in range(update.rank):
                w = weights[..., start] if name == "rank-wise" else weights[..., place]
                start += 1
                expected = expected + w[..., None] * update.scale * (x @ update.a[rank])[..., None] * update.b[:, rank]
    assert torch.allclose(found, expected, atol=1e-5)


def test_padding_and_batch_make_no_difference(ready: dict[str, Path], lm: LanguageModel) -> None:
    _joint(lm, ready, "top-p", init=0.5)
    mask = torch.ones_like(IDS)
    mask[0, 12:] = 0
    with torch.no_grad():
        both = lm.model(input_ids=IDS, attention_mask=mask).logits
        alone = lm.model(input_ids=IDS[:1, :12]).logits
    assert torch.allclose(both[:1, :12], alone, atol=1e-5)


def test_gradients_reach_experts_and_routers_and_not_the_base(ready: dict[str, Path], lm: LanguageModel) -> None:
    joint = _joint(lm, ready, "softmax-top-k", per="block", balance="switch")
    loss = lm.model(IDS).logits.pow(2).mean()
    extra = joint.loss(torch.ones_like(IDS, dtype=torch.bool), None)
    assert extra is not None
    (loss + extra).backward()
    learned = {id(tensor) for tensor in joint.trained().values()}
    for name, parameter in lm.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learned), name
    sites = set(joint.gate.tensors)
    assert "model.layers.0.mlp.gate_proj.router" in sites
    assert "model.layers.0.mlp.down_proj.router" not in sites


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax-top-k", {"per": "block", "top": 1}),
        ("top-p", {}),
        ("null-experts", {"nulls": 2, "top": 2, "per": "block"}),
        ("shared-experts", {"shared": ("words",)}),
        ("rank-wise", {"top": 3}),
        ("tree", {"band": 0.5}),
        ("random-top-k", {"top": 1, "per": "block"}),
    ],
)
def test_the_engine_serves_what_was_trained(
    name: str, options: dict[str, Any], ready: dict[str, Path], lm: LanguageModel, tiny_base: Path
) -> None:
    """`words` lacks gate_proj and `sums` o_proj: blocks are decided as one, by the same experts, on both sides."""
    joint = _joint(lm, ready, name, **options)
    generator = torch.Generator().manual_seed(3)
    for tensor in joint.gate.tensors.values():
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    kind = plugins.load("gate", name)
    tensors = {key: tensor.detach().clone().float() for key, tensor in joint.gate.tensors.items()}
    served = kind(kind.Options.from_mapping(options), tensors=tensors, experts=tuple(ready))
    engine = TorchEngine(load_model(str(tiny_base), device="cpu"))
    for key, folder in ready.items():
        engine.add_expert(key, folder)
    engine.add_gate("g", served)
    weighted = tuple((key, 1.0) for key in ready)
    requests = [EngineRequest(f"r{i}", tuple(IDS[i, :9].tolist()), weighted, gate="g") for i in range(2)]
    found = engine.continuation_logprobs(requests, [tuple(row[9:].tolist()) for row in IDS])
    with torch.no_grad():
        expected = lm.model(IDS).logits.log_softmax(-1)[:, 8:-1].gather(-1, IDS[:, 9:, None])[..., 0]
    assert torch.allclose(torch.tensor(found), expected, atol=1e-4)
