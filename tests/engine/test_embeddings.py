"""Embeddings of the served base: the mean of its last hidden states, whatever stands beside a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xpert.embedders.lm import LanguageModelStates
from xpert.errors import BadInput
from xpert.experts.engines import torch_lora
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EmbedderContext

TEXTS = ["Add the two numbers. 3 + 4", "x", "Which country is the city in? Oslo", "one two three four five six seven"]


@pytest.fixture
def prompts(lm: LanguageModel) -> list[tuple[int, ...]]:
    return [tuple(lm.tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("tokens", [1, 16, 2048])
def test_they_are_the_mean_of_the_last_states(
    engine: TorchEngine,
    prompts: list[tuple[int, ...]],
    plain: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
) -> None:
    """Of the plain base, although the engine has experts; in batches of any size."""
    monkeypatch.setattr(torch_lora, "EMBED_TOKENS", tokens)
    found = engine.embed(prompts)
    assert found.dtype == np.float32 and found.shape == (4, 64)
    for row, prompt in zip(found, prompts, strict=True):
        with torch.inference_mode():
            states = plain(None)(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        mean = states.mean(0)
        assert np.allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)


def test_they_are_those_of_the_embedder_lm(
    engine: TorchEngine, prompts: list[tuple[int, ...]], tiny_base: Path
) -> None:
    """Before it takes off the pool's mean."""
    raw = LanguageModelStates(EmbedderContext(base=str(tiny_base), device="cpu")).raw(TEXTS)
    assert np.allclose(engine.embed(prompts), raw, atol=1e-5)


def test_no_prompts(engine: TorchEngine) -> None:
    assert engine.embed([]).shape == (0, 64)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "prompt 1: the prompt is empty"),
        ((5,) * 513, "prompt 1: the prompt has 513 tokens; .* holds 512. Shorten"),
        ((-1,), "prompt 1: the prompt holds a token outside"),
    ],
)
def test_what_cannot_be_embedded(engine: TorchEngine, prompt: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        engine.embed([(5, 6), prompt])
