"""Joint training on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput
from xpert.experts.mixture_file import load_mixture
from xpert.experts.mixture_training import train_mixture
from xpert.experts.train_options import TrainOptions
from xpert.records import Shots
from xpert.registry.card import ExpertCard
from xpert.registry.card_schema import check_card
from xpert.selection_folder import write_jsonl, write_rows
from xpert.storage import hash_file, write_manifest

QUICK: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "checkpoint_steps": 3, "epochs": 2.0}
PARAMS: dict[str, dict[str, Any]] = {
    "softmax-top-k": {"balance": "switch", "per": "block"},
    "shared-experts": {"shared": ("words",)},
    "rank-wise": {"speed": 0.01},
}


def _options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{**QUICK, **changes})


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = [folder / "gate.safetensors", *sorted(folder.glob("experts/*/adapter_model.safetensors"))]
    return {f"{file.relative_to(folder)} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def _same(first: Path, second: Path) -> bool:
    import torch

    a, b = _tensors(first), _tensors(second)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-5) for name in a)


LEARNED = ["softmax-top-k", "top-p", "null-experts", "shared-experts", "rank-wise", "tree", "random-top-k"]


@pytest.mark.parametrize("gate", LEARNED)
def test_the_loss_falls_with_every_gate(gate: str, source: Path, mixture_file: Path, tmp_path: Path) -> None:
    params = PARAMS.get(gate, {})
    out = train_mixture(source, mixture_file, gate, tmp_path / "out", _options(), gate_params=params, device="cpu")
    losses = [record["loss"] for record in _log(out)]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not list(tmp_path.glob(".out*"))


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_written_mixture(
    source: Path, mixture_file: Path, tiny_base: Path, tmp_path: Path, xpert: Callable[..., Result]
) -> None:
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    command = ["train", source, "--mixture", mixture_file, "--gate", "softmax-top-k", "-o", out, "--device", "cpu"]
    command += ["--gate-param", "balance=switch", "--gate-param", "top=1", "--batch-size", 4, "--json"]
    command += ["--learning-rate", 3e-3, "--max-steps", 4]
    result = xpert(*command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 4
    written = load_mixture(out)
    assert (written.keys, written.router, written.name) == (("sums", "words"), "uniform", "pair")
    plain = json.loads((out / "mixture.json").read_text())
    assert [expert["ref"] for expert in plain["experts"]] == ["./experts/sums", "./experts/words"]
    choice = plain["gate"]
    assert (choice["name"], choice["file"]) == ("softmax-top-k", "./gate.safetensors")
    assert choice["params"]["balance"] == "switch" and choice["params"]["top"] == 1
    assert choice["fingerprint"] == hash_file(out / "gate.safetensors")
    with safe_open(out / "gate.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["experts"]) == ["sums", "words"]
        names = set(opened.keys())
    assert "model.layers.1.mlp.down_proj.router" in names and len(names) == 2 * 6

    before = load_mixture(mixture_file)
    for old, new in zip(before.experts, written.experts, strict=True):
        first, second = (load_file(expert.folder / "adapter_model.safetensors") for expert in (old, new))
        assert first.keys() == second.keys()
        assert all(first[name].shape == second[name].shape for name in first)
        assert any(not torch.equal(first[name], second[name]) for name in first)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), new.folder)
        assert model(torch.arange(3, 30)[None]).logits.isfinite().all()
        card = ExpertCard.read(new.folder)
        assert "trained jointly" in card.description and card.profile is None
        check_card(card.to_dict(), "here")
        assert card.gates == {} and card.prototypes == ()
        assert card.training["jointly"]["began_as"]["fingerprint"] == old.fingerprint
        assert card.files == {p.name: hash_file(p) for p in new.folder.iterdir() if p.name != "expert.json"}
        assert new.routable().exemplars == old.routable().exemplars
    # Twelve sites of at most two experts, a choice each: about 0.001 times 12.
    assert [record["router_loss"] for record in _log(out)] == pytest.approx([0.012] * 4, rel=0.3)
    again = xpert(*command)
    assert again.exit_code == 0 and "is trained already" in again.stderr
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_frozen_experts_stay_and_the_router_learns(source: Path, mixture_file: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    out = train_mixture(
        source,
        mixture_file,
        "softmax-top-k",
        tmp_path / "out",
        _options(max_steps=3),
        freeze_experts=True,
        device="cpu",
    )
    for old, new in zip(load_mixture(mixture_file).experts, load_mixture(out).experts, strict=True):
        first, second = (load_file(expert.folder / "adapter_model.safetensors") for expert in (old, new))
        assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_mixture(
        source,
        mixture_file,
        "softmax-top-k",
        tmp_path / "other",
        _options(max_steps=1),
        freeze_experts=True,
        device="cpu",
    )
    a, b = load_file(out / "gate.safetensors"), load_file(other / "gate.safetensors")
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("gate", "step", "accumulation"), [("softmax-top-k", 4, 2), ("rank-wise", 7, 1), ("random-top-k", 8, 1)]
)
def test_a_killed_run_ends_with_the_same_weights(
    gate: str,
    step: int,
    accumulation: int,
    source: Path,
    mixture_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xpert.experts.training_callbacks import StepLog

    class Killed(Exception):
        pass

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Killed

    params, options = PARAMS.get(gate, {}), _options(gradient_accumulation=accumulation)
    whole = train_mixture(source, mixture_file, gate, tmp_path / "whole", options, gate_params=params, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(StepLog, "on_step_end", on_step_end, raising=False)
        train_mixture(source, mixture_file, gate, tmp_path / "parts", options, gate_params=params, device="cpu")
    assert not (tmp_path / "parts").exists()
    parts = train_mixture(source, mixture_file, gate, tmp_path / "parts", options, gate_params=params, device="cpu")
    assert _same(whole, parts)
    assert [r["loss"] for r in _log(whole)] == pytest.approx([r["loss"] for r in _log(parts)], rel=1e-4)


def test_checkpoints_hold_what_is_trained_alone(
    source: Path, mixture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts import mixture_training as module

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(module, "write_trained_mixture", fail)
    with pytest.raises(RuntimeError):
        train_mixture(source, mixture_file, "tree", tmp_path / "out", _options(max_steps=3), device="cpu")
    (checkpoint,) = tmp_path.glob(".out.training-*/checkpoint-3")
    assert not list(checkpoint.glob("*model*"))
    assert (checkpoint / "mixture.safetensors").stat().st_size < 200_000
    monkeypatch.undo()
    train_mixture(source, mixture_file, "tree", tmp_path / "out", _options(max_steps=3), device="cpu")


def test_shots_held_out_give_a_validation_loss(
    rows: list[Any], mixture_file: Path, tmp_path: Path, xpert: Callable[..., Result]
) -> None:
    folder = tmp_path / "selection"
    folder.mkdir()
    write_jsonl(folder / "selected.jsonl", ({**row.columns, "_xpert": {"rank": 1}} for row in rows[:12]))
    write_rows(folder / "rows.jsonl", rows[:12])
    write_rows(folder / "shots.jsonl", Shots(tuple(rows[100:104])), columns=True)
    files = {path.name: hash_file(path) for path in folder.iterdir()}
    write_manifest(folder, "selection", inputs={}, config={}, seed=0, figures={"rows": 12, "files": files})
    arguments = ["--mixture", mixture_file, "--gate", "top-p", "--hold-out-shots", 2, "--max-steps", 4, "--json"]
    result = xpert("train", folder, *arguments, "--learning-rate", 3e-3, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["held_out_shots"], figures["rows"]) == (2, 14)
    assert figures["validation_loss"] < figures["validation_loss_before"]


def test_rows_of_two_kinds_reach_the_localised_loss(source: Path, mixture_file: Path, tmp_path: Path) -> None:
    params = {"top": 0, "balance": "localised", "knowledge_skills": "city,colour", "balance_weight": 0.1}
    out = train_mixture(
        source, mixture_file, "softmax-top-k", tmp_path / "out", _options(max_steps=3), gate_params=params, device="cpu"
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["gate_params"]["knowledge_skills"] == ["city", "colour"]
    with pytest.raises(BadInput, match="no row has a skill among knowledge-skills"):
        params["knowledge_skills"] = "chess"
        train_mixture(source, mixture_file, "softmax-top-k", tmp_path / "no", gate_params=params, device="cpu")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "arrow"], "gate arrow has no router that is trained for a mixture"),
        (["--gate", "sofmax-top-k"], "did you mean 'softmax-top-k'"),
        ([], "--mixture needs --gate"),
        (["--gate", "top-p", "--gate-param", "q=1"], "unknown parameter 'q'"),
        (["--gate", "top-p", "--rank", 16], "--rank does not go with --mixture"),
        (["--gate", "top-p", "--activation-checkpointing"], "does not go with a mixture"),
        (["--gate", "random-top-k", "--freeze-experts"], "nothing to train"),
        (["--gate", "shared-experts", "--gate-param", "shared=wods"], "did you mean 'words'"),
    ],
)
def test_mistakes_of_the_user(
    arguments: list[Any],
    message: str,
    source: Path,
    mixture_file: Path,
    tmp_path: Path,
    xpert: Callable[..., Result],
) -> None:
    result = xpert("train", source, "--mixture", mixture_file, "-o", tmp_path / "out", "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert message.lower() in result.stderr.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--base is missing"),
        (["--base", "x", "--freeze-experts"], "--freeze-experts needs --mixture"),
        (["--base", "x", "--gate-param", "top=1"], "--gate-param needs --mixture"),
    ],
)
def test_options_of_a_mixture_without_one(
    arguments: list[Any], message: str, source: Path, tmp_path: Path, xpert: Callable[..., Result]
) -> None:
    result = xpert("train", source, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
