"""The small training loop: deterministic, what it keeps is complete, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xpert.errors import BadInput
from xpert.language_model import load_model
from xpert.linear_capture import encode_rows, make_batch, row_losses
from xpert.lora_training import LoraOptions, _course, train_adapter, warm_up
from xpert.progress import Silent
from xpert.records import Message, Row

SMALL = LoraOptions(rank=4, alpha=8, epochs=3, batch_size=8, learning_rate=5e-3, max_length=128)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    random_state = torch.get_rng_state()
    states = train_adapter(lm, rows[:24], SMALL)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training

    from xpert.linear_capture import linear_layers
    from xpert.lora_gradients import merged, place_factors

    batch = make_batch(encode_rows(lm.tokenizer, rows[:24], 128), lm.device)
    losses = [float(row_losses(lm.model, batch).mean().detach())]
    for state in states:
        with merged(linear_layers(lm.model, "all"), place_factors(lm.model, state, lm.device)), torch.no_grad():
            losses.append(float(row_losses(lm.model, batch).mean()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def test_it_is_adamw_by_name_and_repeats(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    states = train_adapter(lm, rows[:24], SMALL, seed=3)
    again = train_adapter(lm, rows[:24], SMALL, seed=3)
    other = train_adapter(lm, rows[:24], SMALL, seed=4)
    assert [state.steps for state in states] == [3, 6, 9]
    for mine, theirs in zip(states, again, strict=True):
        for kind in ("weights", "first", "second"):
            ours = getattr(mine, kind)
            assert set(ours) == set(mine.weights)
            assert all(torch.equal(value, getattr(theirs, kind)[name]) for name, value in ours.items())
            assert all(value.shape == mine.weights[name].shape for name, value in ours.items())
    assert any(not torch.equal(value, other[-1].weights[name]) for name, value in states[-1].weights.items())
    rates = [np.mean([5e-3 * _course(step, 9, 0.03) for step in range(e, e + 3)]) for e in (0, 3, 6)]
    assert [state.learning_rate for state in states] == pytest.approx(rates)


def test_the_first_step_by_hand(rows: list[Row], tiny_base: Path) -> None:
    """One step without dropout: m = .1 g and v = .001 g^2 of the loss's own gradient, each under its own name."""
    lm = load_model(str(tiny_base), device="cpu")
    options = dataclasses.replace(SMALL, epochs=1, dropout=0.0, max_gradient_norm=0)
    [state] = train_adapter(lm, rows[:8], options)
    start = train_adapter(lm, [], options)[0]
    assert all(not value.any() for name, value in start.weights.items() if name.endswith("lora_B"))
    from xpert.linear_capture import linear_layers
    from xpert.lora_gradients import merged, place_factors, stream_gradients

    layers, factors = linear_layers(lm.model, "all"), place_factors(lm.model, start, lm.device)
    examples = encode_rows(lm.tokenizer, rows[:8], 128)
    batch = make_batch(examples, lm.device)
    share = (batch.answer_tokens / batch.answer_tokens.sum())[:, None]  # mean over tokens, not over rows
    with merged(layers, factors):
        found: dict[str, torch.Tensor] = {}
        stream_gradients(lm, batch, layers, factors, lambda name, g: found.update({name: (g * share).sum(0)}))
    for name, gradient in found.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(state.first[name].flatten(), 0.1 * gradient, rtol=1e-3, atol=1e-4 * largest + 1e-9)
        torch.testing.assert_close(
            state.second[name].flatten(), 0.001 * gradient**2, rtol=2e-3, atol=1e-4 * largest**2 + 1e-12
        )


def test_the_course_of_the_rate() -> None:
    assert [_course(step, 10, 0.2) for step in range(10)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert _course(0, 1, 0.5) == 0.5
    assert _course(0, 4, 0.0) == 1


def test_going_on_from_an_adapter(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    first = train_adapter(lm, rows[:8], SMALL)[-1]
    still = dataclasses.replace(SMALL, learning_rate=0.0, epochs=1)
    same = train_adapter(lm, rows[8:16], still, start=first)[-1]
    assert all(torch.equal(value, first.weights[name]) for name, value in same.weights.items())
    with pytest.raises(BadInput, match="another rank or another scale"):
        train_adapter(lm, rows[:8], dataclasses.replace(SMALL, alpha=32), start=first)
    with pytest.raises(BadInput, match="other layers"):
        train_adapter(lm, rows[:8], dataclasses.replace(SMALL, layers=("mlp",)), start=first)


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_finished_warm_up_is_recognised(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    base = str(tiny_base)
    found = warm_up(base, rows[:8], SMALL, tmp_path, device="cpu")
    assert [checkpoint.steps for checkpoint in found] == [1, 2, 3]
    [folder] = tmp_path.iterdir()
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    stamp = (folder / "checkpoints.json").stat().st_mtime_ns
    again = warm_up(base, rows[:8], SMALL, tmp_path, device="cpu")
    assert again == found
    assert (folder / "checkpoints.json").stat().st_mtime_ns == stamp
    for changed in (
        {"rows": rows[1:9], "options": SMALL, "seed": 0},
        {"rows": rows[:8], "options": dataclasses.replace(SMALL, epochs=1), "seed": 0},
        {"rows": rows[:8], "options": SMALL, "seed": 1},
    ):
        other = warm_up(base, changed["rows"], changed["options"], tmp_path, device="cpu", seed=changed["seed"])
        assert other[-1].fingerprint != found[-1].fingerprint
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_warm_up_is_said_to_be_so_and_made_again(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    found = warm_up(str(tiny_base), rows[:8], SMALL, tmp_path, device="cpu")
    path = found[1].folder / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="cannot be read"):
        found[1].load()
    progress = Listening()
    again = warm_up(str(tiny_base), rows[:8], SMALL, tmp_path, device="cpu", progress=progress)
    assert "damaged" in progress.said[0]
    assert again == found
    again[1].load()


def test_peft_reads_what_is_kept(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = load_model(str(tiny_base), device="cpu")
    state = train_adapter(lm, rows[:8], dataclasses.replace(SMALL, rslora=True))[-1]
    kept = state.save(tmp_path, str(tiny_base))
    loaded = kept.load()
    for kind in ("weights", "first", "second"):
        assert all(torch.equal(value, getattr(loaded, kind)[name]) for name, value in getattr(state, kind).items())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
    module: Any = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert torch.equal(module.lora_A["default"].weight, state.weights["model.layers.1.self_attn.q_proj.lora_A"])
    assert module.scaling["default"] == state.scale == 8 / 4**0.5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_base)


def test_what_cannot_be_trained(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    long = Row("long", (Message("user", "word " * 400),), "yes")
    with pytest.raises(BadInput, match=r"none of the 1 warm-up rows has room for its answer in 128 tokens"):
        train_adapter(lm, [long], SMALL)
    assert train_adapter(lm, [long, *rows[:8]], dataclasses.replace(SMALL, epochs=1))[0].steps == 1
    with pytest.raises(BadInput, match=r"unknown layer 'q_prj'\. Did you mean 'q_proj'"):
        train_adapter(lm, rows[:8], dataclasses.replace(SMALL, layers=("q_prj",)))
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match=r"the training loss is not a number \(rows r0000"):
        train_adapter(lm, rows[:8], SMALL)
    assert not any("lora" in name for name, _ in lm.model.named_modules())
