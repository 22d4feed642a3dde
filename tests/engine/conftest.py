"""The tiny model as a `LanguageModel`, experts for it, and plain peft to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.engines._lora_plan import RowMixture
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel, load_model
from xpert.protocols import EngineRequest, Sampling, WeightedExperts

SHAPES: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 8, "use_rslora": True, "lora_alpha": 4},
    "c": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "d": {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
}


@pytest.fixture(scope="session")
def lm(tiny_base: Path) -> LanguageModel:
    return load_model(str(tiny_base), device="cpu")


@pytest.fixture(scope="session")
def folders(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Experts of unequal ranks, scalings and target modules."""
    return {key: make_adapter(seed=ord(key), **settings) for key, settings in SHAPES.items()}


def on_device(engine: TorchEngine) -> TorchEngine:
    """Waits until all experts have come, for tests that count steps."""
    for key in engine.experts:
        engine._bank.release(engine._bank.wait([engine._bank.resolve(key)]))
    return engine


@pytest.fixture
def engine(lm: LanguageModel, folders: dict[str, Path]) -> TorchEngine:
    engine = TorchEngine(lm, max_batch=4)
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    return on_device(engine)


@pytest.fixture(scope="session")
def plain(tiny_base: Path, folders: dict[str, Path]) -> Callable[..., Any]:
    """Plain peft's model of one expert (or the base for None)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made: dict[str | None, Any] = {}

    def model(key: str | None) -> Any:
        if key not in made:
            base = AutoModelForCausalLM.from_pretrained(tiny_base)
            made[key] = base if key is None else PeftModel.from_pretrained(base, folders[key])
        return made[key]

    return model


@pytest.fixture(scope="session")
def plain_reply(plain: Callable[..., Any], lm: LanguageModel) -> Callable[..., tuple[int, ...]]:
    """Token ids of plain peft's greedy reply to one prompt."""
    import torch

    def reply(key: str | None, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        ids = torch.tensor([list(prompt)])
        made = plain(key).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(lm.stop_ids),
        )
        return tuple(made[0, len(prompt) :].tolist())

    return reply


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of expert `a` to be spoiled."""
    return Path(shutil.copytree(folders["a"], tmp_path / "expert"))


@pytest.fixture
def mixture_of() -> Callable[..., RowMixture]:
    """What an engine computes a row of these weighted experts with, adapters at hand."""

    def make(engine: TorchEngine, experts: WeightedExperts, gate: str | None = None) -> RowMixture:
        asked = engine._asked(experts, gate, (), where="test")
        if not asked.handles:
            return RowMixture()
        lease = engine._bank.wait(asked.handles)
        assert lease is not None
        return asked.with_adapters(lease, asked.handles)

    return make


@pytest.fixture
def ask(lm: LanguageModel) -> Callable[..., EngineRequest]:
    def make(id: str, prompt: str, experts: WeightedExperts = (), **sampling: Any) -> EngineRequest:
        ids = tuple(lm.tokenizer(prompt)["input_ids"])
        return EngineRequest(id, ids, experts, Sampling(**{"max_tokens": 12} | sampling))

    return make


@pytest.fixture
def replies(engine: TorchEngine) -> Callable[..., dict[str, str]]:
    """Whole replies by request id."""

    def run(requests: Sequence[EngineRequest], on: TorchEngine | None = None) -> dict[str, str]:
        texts: dict[str, str] = {request.id: "" for request in requests}
        for piece in (on or engine).generate(requests):
            texts[piece.request_id] += piece.text
        return texts

    return run
