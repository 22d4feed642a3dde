"""Scores of given continuations equal those of plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xpert.errors import BadInput
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest

Ask = Callable[..., EngineRequest]


def test_scores_equal_plain_forward_passes(
    engine: TorchEngine, lm: LanguageModel, ask: Ask, plain: Callable[..., Any]
) -> None:
    """Choices of unlike lengths of four questions, with and without experts; more rows than a batch holds."""
    import torch

    cases = [
        (key, prompt, choice)
        for key, prompt in [("a", "Add the two numbers."), (None, "x"), ("b", "Add the two numbers."), ("c", "one two")]
        for choice in ["7", " forty-two and more of it", " no", "!"]
    ]
    requests = [ask(str(i), prompt, ((key, 1.0),) if key else ()) for i, (key, prompt, _) in enumerate(cases)]
    continuations = [tuple(lm.tokenizer(choice)["input_ids"]) for _, _, choice in cases]
    found = engine.continuation_logprobs(requests, continuations)
    for (key, _, _), request, continuation, scores in zip(cases, requests, continuations, found, strict=True):
        with torch.inference_mode():
            logits = plain(key)(torch.tensor([request.prompt_ids + continuation])).logits[0]
        places = torch.arange(len(request.prompt_ids) - 1, len(request.prompt_ids) + len(continuation) - 1)
        expected = logits.log_softmax(-1)[places, torch.tensor(continuation)]
        assert torch.allclose(torch.tensor(scores), expected, atol=1e-4)


def test_a_shared_prompt_is_computed_once(engine: TorchEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Any] = []
    prefill = engine._passes.prefill

    def counted(given: Any, experts: Any) -> Any:
        prompts.extend(given)
        return prefill(given, experts)

    monkeypatch.setattr(engine._passes, "prefill", counted)
    engine.continuation_logprobs([ask(str(i), "Which?", (("a", 1.0),)) for i in range(4)], [(5,), (6, 7), (8,), (9,)])
    assert len(prompts) == 1


def test_nothing_to_score(engine: TorchEngine) -> None:
    assert engine.continuation_logprobs([], []) == []


@pytest.mark.parametrize(
    ("length", "continuation", "message"),
    [
        (3, (), "the continuation is empty"),
        (0, (1,), "the prompt is empty"),
        (510, (1, 2, 3), "the prompt has 510 tokens; the context"),
        (3, (10**7,), "token outside"),
    ],
)
def test_what_cannot_be_scored(engine: TorchEngine, length: int, continuation: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadInput, match=f"request q: .*{message}|{message}"):
        engine.continuation_logprobs([EngineRequest("q", (5,) * length)], [continuation])
