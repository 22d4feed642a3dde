"""The vectors an expert keeps for token gates: what is learned and measured, and what becomes of its folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import nn

from xpert.errors import BadInput, Corrupt
from xpert.experts.adapters import LowRank, read_adapter
from xpert.experts.gate_options import GateOptions
from xpert.experts.gate_training import average_activations, expert_applied, train_phatgoose
from xpert.experts.gate_vectors import add_gate
from xpert.language_model import LanguageModel, encode_examples, load_model
from xpert.linear_capture import make_batch, row_losses
from xpert.records import Row
from xpert.registry.card import BaseModel, ExpertCard
from xpert.registry.store import Registry
from xpert.storage import hash_file

QUICK = GateOptions(steps=4, batch_size=8)


@pytest.fixture
def lm(tiny_base: Path) -> LanguageModel:
    return load_model(str(tiny_base), device="cpu")


@pytest.fixture
def source(write_jsonl: Callable[..., Path], columns: Callable[..., list[dict[str, Any]]]) -> Path:
    return write_jsonl("rows.jsonl", columns(24))


@pytest.fixture
def folder(make_adapter: Callable[..., Path], lm: LanguageModel) -> Path:
    """A finished expert with a card that knows its files."""
    made = make_adapter(seed=5, r=3, scale=0.1, rank_pattern={"q_proj": 5})
    card = ExpertCard(BaseModel(lm.ref, lm.fingerprint), {"rank": 3}, name="five")
    names = ("adapter_config.json", "adapter_model.safetensors")
    dataclasses.replace(card, files={name: hash_file(made / name) for name in names}).write(made)
    return made


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────


class Toy(nn.Module):
    """Predicts a token from the one before: logits = layer(state). Tokens 0-3 and 4-7 differ by a direction alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.layer = nn.Linear(6, 12, bias=False)
        self.head = nn.Identity()
        with torch.no_grad():
            self.layer.weight.zero_()
            self.embedding.weight.zero_()
            for kind in range(4):
                self.embedding.weight[kind] = torch.tensor([*torch.eye(4)[kind], 2.0, 0.3])
                self.embedding.weight[4 + kind] = torch.tensor([*torch.eye(4)[kind], -2.0, 0.3])

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.layer(self.embedding(input_ids))))


@pytest.fixture
def planted() -> tuple[Toy, dict[str, LowRank], list[Any], list[Row]]:
    """An expert that is right where the fifth coordinate is positive, and wrong where it is negative."""
    b = torch.zeros(12, 4)
    b[8:, :] = 4 * torch.eye(4)
    updates = {"layer": LowRank(torch.eye(4, 6), b)}
    right = [((kind, 8 + kind), 1) for kind in range(4)]
    wrong = [((4 + kind, 8 + (kind + 1) % 4), 1) for kind in range(4)]
    examples = [*right, *wrong] * 4
    return Toy().eval(), updates, examples, [Row(str(i), (), "") for i in range(len(examples))]


def loss(model: Any, updates: Any, examples: Any, vectors: Any) -> float:
    with torch.inference_mode(), expert_applied(model, updates, vectors):
        return float(row_losses(model, make_batch(examples, torch.device("cpu"))).mean())


def test_a_phatgoose_vector_opens_where_the_expert_is_of_use(planted: Any) -> None:
    model, updates, examples, rows = planted
    options = GateOptions(steps=150, learning_rate=0.05, batch_size=8)
    vectors, figures = train_phatgoose(model, updates, examples, rows, options)
    zero = {"layer": torch.zeros(6)}
    trained = loss(model, updates, examples, vectors)
    never, always = (loss(model, {}, examples, {}), loss(model, updates, examples, None))
    assert trained < 0.75 * loss(model, updates, examples, zero)
    assert trained < 0.75 * min(never, always)
    best = (loss(model, updates, examples[:4], None) + never) / 2  # the expert for its own half alone
    assert trained < 1.05 * best
    gates = torch.sigmoid(model.embedding.weight @ vectors["layer"])
    assert (gates[:4] > 0.9).all() and (gates[4:8] < 0.1).all()
    assert vectors["layer"][:4].abs().max() < 0.5 * vectors["layer"][4]  # the direction that tells them apart
    assert figures["steps"] == 150 and figures["final_loss"] < figures["first_loss"]
    assert figures["first_loss"] == pytest.approx(loss(model, updates, examples, zero), rel=0.2)


def test_training_leaves_the_model_as_it_was_and_follows_the_seed(
    lm: LanguageModel, folder: Path, rows: list[Row]
) -> None:
    updates = read_adapter("five", folder, lm).modules
    examples = encode_examples(lm.tokenizer, rows[:12])
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    made = [train_phatgoose(lm.model, updates, examples, rows[:12], QUICK, seed=seed)[0] for seed in (3, 3, 4)]
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert made[0].keys() == updates.keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in updates)
    assert not all(torch.equal(made[0][name], made[2][name]) for name in updates)
    assert all(vector.abs().max() > 0 for vector in made[0].values())


def test_an_error_leaves_no_hooks_and_no_frozen_weights(
    lm: LanguageModel, folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = read_adapter("five", folder, lm).modules
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_phatgoose(lm.model, updates, encode_examples(lm.tokenizer, rows[:4]), rows[:4], QUICK)
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_the_passes_of_a_step_make_no_difference(
    lm: LanguageModel, folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts import gate_training

    updates = read_adapter("five", folder, lm).modules
    examples = encode_examples(lm.tokenizer, rows[:8])
    whole, figures = train_phatgoose(lm.model, updates, examples, rows[:8], QUICK)
    monkeypatch.setattr(gate_training, "_BATCH_TOKENS", 60)
    parts, again = train_phatgoose(lm.model, updates, examples, rows[:8], QUICK)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-4) for name in updates)
    assert again["final_loss"] == pytest.approx(figures["final_loss"], rel=1e-4)


def test_the_expert_applied_in_full_is_plain_peft(lm: LanguageModel, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm.folder), folder)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode(), expert_applied(lm.model, read_adapter("five", folder, lm).modules):
        found = lm.model(ids).logits
    assert torch.allclose(found, plain(ids).logits, atol=1e-4)


def test_average_activations_are_the_mean_states_of_the_last_prompt_tokens(
    lm: LanguageModel, folder: Path, rows: list[Row]
) -> None:
    updates = read_adapter("five", folder, lm).modules
    examples = encode_examples(lm.tokenizer, rows[:9])
    found, figures = average_activations(lm.model, updates, examples, 7)
    assert figures == {"prompts": 7, "tokens": sum(min(start, len(ids)) for ids, start in examples[:7])}
    states: dict[str, list[torch.Tensor]] = {name: [] for name in updates}
    for ids, start in examples[:7]:  # one by one, without padding
        seen: Callable[[str, torch.Tensor], None] = lambda name, x: states[name].append(x[0, -1])  # noqa: E731
        with torch.inference_mode(), expert_applied(lm.model, updates, seen=seen):
            lm.model(torch.tensor([ids[:start]]))
    for name, vectors in states.items():
        assert len(vectors) == 7
        assert torch.allclose(found[name], torch.stack(vectors).mean(0), atol=1e-4)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_vectors_are_written_beside_the_adapter_and_those_of_others_stay(
    folder: Path, source: Path, lm: LanguageModel
) -> None:
    other = {"other.model.layers.0.self_attn.q_proj": torch.ones(64)}
    save_file(other, folder / "gates.safetensors")
    add_gate(folder, source, "phatgoose", QUICK, device="cpu")
    first = load_file(folder / "gates.safetensors")
    add_gate(folder, source, "average-activation", device="cpu")
    both = load_file(folder / "gates.safetensors")
    adapter = read_adapter("five", folder, lm)
    names = {f"{gate}.{module}" for gate in ("phatgoose", "average-activation") for module in adapter.modules}
    assert both.keys() == {*other, *names} == adapter.gate_tensors.keys()
    assert all(torch.equal(both[name], vector) for name, vector in first.items())
    card = ExpertCard.read(folder)
    assert card.files["gates.safetensors"] == hash_file(folder / "gates.safetensors")
    assert set(card.gates) == {"phatgoose", "average-activation"}
    assert card.gates["phatgoose"]["figures"]["steps"] == 4
    assert card.gates["average-activation"]["figures"]["prompts"] == 10
    assert card.gates["average-activation"]["options"]["prompts"] == 10
    assert "steps" not in card.gates["average-activation"]["options"]
    assert not list(folder.glob(".gates*"))


def test_vectors_that_are_there_are_recognised(
    folder: Path, source: Path, write_jsonl: Callable[..., Path], columns: Callable[..., Any]
) -> None:
    note = add_gate(folder, source, "phatgoose", QUICK, device="cpu")
    written = (folder / "gates.safetensors").stat().st_mtime_ns

    def made_again(source: Path, options: GateOptions = QUICK, seed: int = 0) -> bool:
        nonlocal written
        add_gate(folder, source, "phatgoose", options, device="cpu", seed=seed)
        now = (folder / "gates.safetensors").stat().st_mtime_ns
        was, written = written, now
        return now != was

    assert not made_again(source)
    assert add_gate(folder, source, "phatgoose", QUICK, device="cpu") == note
    assert made_again(source, seed=1)
    assert made_again(source, dataclasses.replace(QUICK, steps=5), seed=1)
    assert made_again(write_jsonl("other.jsonl", columns(9)), QUICK, seed=1)
    save_file({"phatgoose.x": torch.ones(2)}, folder / "gates.safetensors")  # not what the card says
    assert made_again(tmp := write_jsonl("other.jsonl", columns(9)), QUICK, seed=1) and tmp


def test_an_expert_with_vectors_goes_through_the_registry(folder: Path, source: Path, tmp_path: Path) -> None:
    add_gate(folder, source, "average-activation", device="cpu")
    registry = Registry(tmp_path / "registry")
    registry.publish(folder, "me/five")
    pulled = registry.pull("me/five")
    assert (pulled / "gates.safetensors").read_bytes() == (folder / "gates.safetensors").read_bytes()
    assert ExpertCard.read(pulled).gates == ExpertCard.read(folder).gates
    save_file({"average-activation.x": torch.ones(2)}, folder / "gates.safetensors")
    with pytest.raises(Corrupt, match=r"gates\.safetensors: changed since its card was written"):
        registry.publish(folder, "me/five")
    (folder / "gates.safetensors").unlink()
    with pytest.raises(Corrupt, match=r"the card names 'gates\.safetensors', which is not there"):
        registry.publish(folder, "me/five")


def test_the_command_s_vectors_are_what_the_gate_reads(
    folder: Path, source: Path, lm: LanguageModel, xpert: Callable[..., Result]
) -> None:
    from xpert import plugins

    command = ["gate", folder, source, "--name", "phatgoose", "--steps", 3, "--batch-size", 8, "--device", "cpu"]
    result = xpert(*command, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["gate"], figures["modules"], figures["steps"], figures["rows"]) == ("phatgoose", 14, 3, 24)
    assert "vectors of 14 modules, 24 rows, 3 steps, loss" in xpert(*command).stdout
    kind = plugins.load("gate", "phatgoose")
    adapter = read_adapter("five", folder, lm)
    module = "model.layers.1.mlp.down_proj"
    weights = kind(kind.Options()).at(module, [adapter])(torch.randn(2, 3, 128), torch.ones(2, 1, 1).bool(), None)
    assert (weights == 1).all()


# ── together with training ───────────────────────────────────────────────────────────────────────────────────────

QUICK_TRAINING = {"batch_size": 4, "rank": 4, "alpha": 8, "learning_rate": 5e-3, "max_steps": 4, "max_length": 256}


@pytest.fixture
def small_gate(monkeypatch: pytest.MonkeyPatch) -> GateOptions:
    """`--gate` with fewer steps than by default."""
    from xpert.experts import train as module

    quick = GateOptions(steps=3, batch_size=8, max_length=256)
    monkeypatch.setattr(module, "GateOptions", lambda **given: dataclasses.replace(quick, **given))
    return quick


def test_training_with_a_gate_is_training_and_then_the_gate(
    source: Path, tiny_base: Path, tmp_path: Path, small_gate: GateOptions
) -> None:
    from xpert.experts.train import TrainOptions, train

    plain = train(source, str(tiny_base), tmp_path / "plain", TrainOptions(**QUICK_TRAINING), device="cpu")
    options = TrainOptions(**QUICK_TRAINING, gate="phatgoose")
    gated = train(source, str(tiny_base), tmp_path / "gated", options, device="cpu")
    assert hash_file(plain / "adapter_model.safetensors") == hash_file(gated / "adapter_model.safetensors")
    add_gate(plain, source, "phatgoose", small_gate, device="cpu")
    assert (plain / "gates.safetensors").read_bytes() == (gated / "gates.safetensors").read_bytes()
    card, other = ExpertCard.read(gated), ExpertCard.read(plain)
    assert card.files == {p.name: hash_file(p) for p in gated.iterdir() if p.name != "expert.json"}
    assert {**card.gates["phatgoose"]["figures"], "seconds": 0} == {**other.gates["phatgoose"]["figures"], "seconds": 0}
    figures = "trainable_parameters"
    assert card.training["figures"][figures] == other.training["figures"][figures] > 0
    assert card.training["key"] != other.training["key"]
    written = (gated / "gates.safetensors").stat().st_mtime_ns
    train(source, str(tiny_base), gated, options, device="cpu")
    add_gate(gated, source, "phatgoose", small_gate, device="cpu")  # the same rows and options: recognised
    assert (gated / "gates.safetensors").stat().st_mtime_ns == written


def test_stopped_while_its_vectors_are_made_an_expert_is_not_trained_again(
    source: Path, tiny_base: Path, tmp_path: Path, small_gate: GateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts import train as module
    from xpert.experts.train import TrainOptions, train

    options = TrainOptions(**QUICK_TRAINING, gate="phatgoose")
    whole = train(source, str(tiny_base), tmp_path / "whole", options, device="cpu")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "make_vectors", stop)
        train(source, str(tiny_base), tmp_path / "parts", options, device="cpu")
    assert not (tmp_path / "parts").exists()
    with monkeypatch.context() as patched:
        patched.setattr(module, "run_steps", stop)
        parts = train(source, str(tiny_base), tmp_path / "parts", options, device="cpu")
    for name in ("adapter_model.safetensors", "gates.safetensors"):
        assert hash_file(parts / name) == hash_file(whole / name)


def test_the_training_key_of_an_expert_without_a_gate_is_as_before() -> None:
    from xpert.experts.train import TrainOptions

    assert "gate" not in TrainOptions().shaping()
    assert TrainOptions(gate="phatgoose").shaping()["gate"] == "phatgoose"


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "phatgose"], "unknown gate 'phatgose'. Did you mean 'phatgoose'?"),
        (["--name", "arrow"], "the gate arrow keeps no vectors of its own with an expert. Name one of phatgoose"),
        (["--name", "glider"], "glider reads those of phatgoose"),
        (["--name", "average-activation", "--steps", 5], "steps is an option of gate phatgoose, not of average"),
        (["--name", "phatgoose", "--prompts", 5], "prompts is an option of gate average-activation"),
        (["--name", "phatgoose", "--steps", 0], "steps is 0; the least is 1"),
        (["--name", "phatgoose", "--learning-rate", 0], "learning-rate is 0; nothing would be learned"),
        (["--name", "phatgoose", "--max-length", 8], "longer than 8 tokens before their answer.*raise --max-length"),
        (["--name", "phatgoose", "--base", "/nowhere/model"], "say by --base where the base model lies now"),
        ([], "Missing option '--name'"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[Any], message: str, folder: Path, source: Path, xpert: Callable[..., Result]
) -> None:
    result = xpert("gate", folder, source, *arguments, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr, re.IGNORECASE), result.stderr
    assert not (folder / "gates.safetensors").exists()


def test_folders_that_are_no_expert(
    folder: Path, source: Path, tmp_path: Path, xpert: Callable[..., Result], lm: LanguageModel
) -> None:
    assert "no such expert folder" in xpert("gate", tmp_path / "x", source, "--name", "phatgoose").stderr
    assert "it has no expert.json" in xpert("gate", tmp_path, source, "--name", "phatgoose").stderr
    (folder / "gates.safetensors").write_bytes(b"nonsense")
    result = xpert("gate", folder, source, "--name", "average-activation", "--device", "cpu")
    assert result.exit_code == 2 and "gates.safetensors: the weights are damaged" in result.stderr
    (folder / "gates.safetensors").unlink()
    dataclasses.replace(ExpertCard.read(folder), base=BaseModel(lm.ref, "f" * 64)).write(folder)
    result = xpert("gate", folder, source, "--name", "average-activation", "--device", "cpu")
    assert result.exit_code == 2 and "the expert was trained on" in result.stderr


def test_gate_vectors_are_made_in_one_process(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts.train import TrainOptions, train

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"in one process, and this run has 2.*xpert gate"):
        train(source, str(tiny_base), tmp_path / "out", TrainOptions(gate="phatgoose"), device="cpu")


def test_a_loss_that_is_no_number_stops(lm: LanguageModel, folder: Path, rows: list[Row]) -> None:
    updates = dict(read_adapter("five", folder, lm).modules)
    first = next(iter(updates))
    updates[first] = LowRank(updates[first].a * torch.inf, updates[first].b)
    with pytest.raises(BadInput, match="the loss is not a number"):
        train_phatgoose(lm.model, updates, encode_examples(lm.tokenizer, rows[:4]), rows[:4], QUICK)
