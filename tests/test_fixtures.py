from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_the_tiny_model_runs_with_an_adapter(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ids = torch.tensor([tokenizer("Add the two numbers.")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, make_adapter(seed=1))
    assert (adapted(ids).logits - before).abs().max() > 0.1
