"""Recruiting by K shots: ranks, reasons, and an expert made to know the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput
from xpert.experts import recruit as recruiting
from xpert.experts.recruit import recruit, score_shots
from xpert.records import Message, Row, Shots

SHOTS = Shots(tuple(Row(f"s{i}", (Message("user", f"question {i}"),), f"answer {i}") for i in range(3)))


@pytest.fixture
def showing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[recruiting.Recruit]]:
    """Recruits among experts with the given (accuracy, perplexity); key "" is the base."""

    def run(shown: dict[str, tuple[float, float]], **options: Any) -> list[recruiting.Recruit]:
        monkeypatch.setattr(
            recruiting, "score_shots", lambda lm, engine, experts, shots: shown[experts[0][0] if experts else ""]
        )
        return recruit(None, None, [key for key in shown if key], SHOTS, **options)

    return run


def test_the_best_are_in_and_say_why(showing: Callable[..., list[recruiting.Recruit]]) -> None:
    found = showing(
        {"": (0.2, 9.0), "sure": (0.9, 2.0), "likely": (0.2, 4.0), "worse": (0.1, 20.0), "right": (0.6, 8.0)},
        max_experts=2,
    )
    assert [(one.key, one.rank, one.chosen) for one in found] == [
        ("sure", 2.0, True),
        ("likely", 5.0, True),
        ("right", 5.0, False),
        ("worse", 8.0, False),
    ]
    reasons = {one.key: one.reason for one in found}
    assert reasons["likely"] == "rank 2: perplexity 4.00 against 9.00"
    assert reasons["right"].startswith("2 experts rank before it")
    assert reasons["worse"].startswith("no better than the base: accuracy 0.10 against 0.20")


def test_nobody_better_than_the_base(showing: Callable[..., list[recruiting.Recruit]]) -> None:
    with pytest.raises(BadInput, match="no expert is better than the base model"):
        showing({"": (0.5, 2.0), "a": (0.5, 2.0), "b": (0.1, 3.0)})


def test_scores_are_those_of_the_model(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    """An answer that the expert gives by itself counts as right; its perplexity is that of a plain peft forward."""
    import math

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from xpert import plugins
    from xpert.language_model import encode_example, load_model
    from xpert.protocols import EngineRequest, Sampling

    lm = load_model(str(tiny_base), device="cpu")
    engine = plugins.load("engine", "torch-lora")(lm, max_batch=4)
    folder = make_adapter(seed=3)
    engine.add_expert("x", folder)
    experts = (("x", 1.0),)
    accuracy, perplexity = score_shots(lm, engine, experts, SHOTS)
    assert accuracy == 0.0
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder).eval()
    expected = []
    requests = []
    encoded = [encode_example(lm.tokenizer, row) for row in SHOTS]
    sampling = Sampling(max_tokens=max(len(ids) - start for ids, start in encoded) + 8)
    for row, (ids, start) in zip(SHOTS, encoded, strict=True):
        with torch.no_grad():
            logprobs = peft(torch.tensor([ids])).logits[0].log_softmax(-1)
        picked = [float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))]
        expected.append(math.exp(-sum(picked) / len(picked)))
        requests.append(EngineRequest(row.id, tuple(ids[:start]), experts, sampling))
    assert perplexity == pytest.approx(sum(expected) / 3, rel=1e-3)
    said = dict.fromkeys((row.id for row in SHOTS), "")
    for piece in engine.generate(requests):
        said[piece.request_id] += piece.text
    own = Shots(tuple(Row(r.id, r.messages, r.response, columns={"answers": ["?", said[r.id]]}) for r in SHOTS))
    assert score_shots(lm, engine, experts, own)[0] == 1.0


def test_mix_with_shots(
    xpert: Callable[..., Any], make_expert: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Random experts: whoever is in has found the answers likelier than the base or answered more of them."""
    import json

    from xpert.registry.store import Registry

    registry = Registry(tmp_path / "r")
    for seed, skill in enumerate(("casing", "city", "colour"), 1):
        registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    shots = write_jsonl("shots.jsonl", [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(4)])
    out = tmp_path / "m.json"
    result = xpert("mix", "--registry", tmp_path / "r", "--shots", shots, "--max-experts", 1, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert len(value["experts"]) == 1 and len(value["recruited"]) == 3
    assert [one["chosen"] for one in value["recruited"]].count(True) == 1
    assert "in : me/" in result.stderr and "out: me/" in result.stderr
