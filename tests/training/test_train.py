"""Training on the tiny model: what is learned, what is written, and what happens when it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput
from xpert.experts import checkpoints
from xpert.experts.train import TrainOptions, lora_config, train
from xpert.experts.training_data import TrainingRows, encode_rows, gather_rows, held_out_count
from xpert.language_model import encode_example, load_model, load_tokenizer
from xpert.progress import SILENT
from xpert.records import Message, Row, Shots
from xpert.registry.card import ExpertCard
from xpert.selection_folder import write_jsonl, write_rows
from xpert.storage import hash_file, write_manifest

QUICK = {"batch_size": 4, "rank": 4, "alpha": 8, "learning_rate": 5e-3, "checkpoint_steps": 3}


@pytest.fixture
def source(write_jsonl: Callable[..., Path], columns: Callable[..., list[dict[str, Any]]]) -> Path:
    return write_jsonl("rows.jsonl", columns(22))


@pytest.fixture
def selection(tmp_path: Path, rows: list[Row]) -> Path:
    """A selection folder of 20 rows and 8 shots, the first row being a shot as well."""
    folder = tmp_path / "selection"
    folder.mkdir()
    shots = Shots(tuple(rows[100:108]))
    chosen = [rows[100], *rows[:19]]
    write_jsonl(folder / "selected.jsonl", ({**row.columns, "_xpert": {"rank": 1}} for row in chosen))
    write_rows(folder / "rows.jsonl", chosen)
    write_rows(folder / "shots.jsonl", shots, columns=True)
    files = {path.name: hash_file(path) for path in folder.iterdir()}
    inputs = {"pool": "p" * 64}
    write_manifest(
        folder, "selection", inputs=inputs, config={"method": "kshot"}, seed=3, figures={"rows": 20, "files": files}
    )
    return folder


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def _same(first: Path, second: Path) -> bool:
    import torch

    a, b = _weights(first), _weights(second)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-5) for name in a)


def _options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{**QUICK, "epochs": 2.0, **changes})


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_trainer_sees_the_encoded_rows_and_learns_their_answers(tiny_base: Path, rows: list[Row]) -> None:
    from xpert.experts.answer_trainer import to_dataset

    tokenizer = load_tokenizer(str(tiny_base))
    dataset = to_dataset(encode_rows(tokenizer, rows[:30], 512))
    for row, found in zip(rows, dataset, strict=False):
        ids, start = encode_example(tokenizer, row)
        assert tuple(found["input_ids"]) == ids
        assert found["labels"] == [-100] * start + list(ids[start:])


def test_the_loss_is_the_plain_one_over_answer_tokens(tiny_base: Path, rows: list[Row]) -> None:
    import torch
    from torch.nn import functional

    from xpert.experts.answer_trainer import answer_loss, to_dataset

    lm = load_model(str(tiny_base), device="cpu")
    encoded = encode_rows(lm.tokenizer, rows[:6], 512)
    width = max(encoded.lengths)
    ids = torch.zeros(6, width, dtype=torch.long)
    labels = torch.full((6, width), -100)
    mask = torch.zeros(6, width, dtype=torch.long)
    for index, found in enumerate(to_dataset(encoded)):
        size = len(found["input_ids"])
        ids[index, :size] = torch.tensor(found["input_ids"])
        labels[index, :size] = torch.tensor(found["labels"])
        mask[index, :size] = 1
    total, count = answer_loss(lm.model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    logits = lm.model(input_ids=ids, attention_mask=mask).logits  # the hook is gone again
    plain = functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    assert logits.shape[:2] == ids.shape
    assert count == encoded.supervised
    assert torch.allclose(total / count, plain, rtol=1e-5)


def test_the_trainer_s_loss_equals_trl_s(tiny_base: Path, rows: list[Row], tmp_path: Path) -> None:
    import torch
    from trl import SFTTrainer

    from xpert.experts import train as module

    encoded = encode_rows(load_tokenizer(str(tiny_base)), rows[:8], 512)
    data = TrainingRows(tuple(rows[:8]), 0, (), {})
    lm = load_model(str(tiny_base), device="cpu")
    run = module.Run(tmp_path, _options(dropout=0.0), 0, data, lm, encoded, encode_rows(lm.tokenizer, [], 9), SILENT)
    trainer = module._trainer(run, resumed=False)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    for items in (None, torch.tensor(40)):
        own = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
        assert torch.allclose(own, theirs, rtol=1e-5)


def test_an_untrained_adapter_is_the_base(tiny_base: Path) -> None:
    import torch
    from peft import get_peft_model

    lm = load_model(str(tiny_base), device="cpu")
    ids = torch.tensor([lm.tokenizer("Add the two numbers.")["input_ids"]])
    before = lm.model(ids).logits
    adapted = get_peft_model(lm.model, lora_config(TrainOptions())).eval()
    assert torch.equal(adapted(ids).logits, before)
    assert not any("lm_head" in name for name, p in adapted.named_parameters() if p.requires_grad)
    named = [name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad]
    assert set(named) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_batches_are_of_like_length_and_hold_each_row_once() -> None:
    import numpy as np

    from xpert.experts.answer_trainer import LengthBatches

    lengths = np.random.default_rng(0).integers(1, 500, 203).tolist()
    sampler = LengthBatches(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(203))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = [np.ptp([lengths[i] for i in first[start : start + 8]]) for start in range(0, 200, 8)]
    assert np.mean(spread) < 30


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shots_come_first_and_once(selection: Path, rows: list[Row]) -> None:
    data = gather_rows(selection, use_shots=True, hold_out="0", seed=0)
    assert (data.shots, len(data.rows)) == (8, 8 + 19)
    assert [row.id for row in data.rows[:9]] == [row.id for row in (*rows[100:108], rows[0])]
    told = {"rows": 20, "inputs": {"pool": "p" * 64}, "config": {"method": "kshot"}, "seed": 3, "figures": {"rows": 20}}
    assert {key: data.selection[key] for key in told} == told
    without = gather_rows(selection, use_shots=False, hold_out="0", seed=0)
    assert (without.shots, len(without.rows), without.validation) == (0, 20, ())


def test_held_out_shots_are_not_trained_on(selection: Path) -> None:
    data = gather_rows(selection, use_shots=True, hold_out="25%", seed=0)
    assert (data.shots, len(data.validation)) == (6, 2)
    assert not {row.response + row.prompt for row in data.validation} & {r.response + r.prompt for r in data.rows}
    other = gather_rows(selection, use_shots=True, hold_out="25%", seed=1)
    assert other.fingerprint != data.fingerprint


@pytest.mark.parametrize(("text", "count"), [("0", 0), ("3", 3), ("0.5", 4), ("25%", 2), ("100%", 8), ("0%", 0)])
def test_how_many_are_held_out(text: str, count: int) -> None:
    assert held_out_count(text, 8) == count


@pytest.mark.parametrize("text", ["many", "-1", "9", "1.5", "200%", "nan"])
def test_a_hold_out_that_makes_no_sense(text: str) -> None:
    with pytest.raises(BadInput, match="hold-out-shots"):
        held_out_count(text, 8)


def test_long_rows_are_cut_or_dropped(tiny_base: Path, rows: list[Row]) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    long_answer = Row("long", (Message("user", "x"),), "word " * 200)
    long_prompt = Row("gone", (Message("user", "word " * 200),), "x")
    encoded = encode_rows(tokenizer, [rows[0], long_answer, long_prompt], 64)
    assert (encoded.kept, encoded.cut, encoded.dropped) == ((0, 1), 1, 1)
    assert encoded.lengths[1] == 64
    assert encoded.supervised == sum(len(ids) - start for ids, start in encoded.examples)


# ── the expert ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_expert_folder(selection: Path, tiny_base: Path, tmp_path: Path, xpert: Callable[..., Result]) -> None:
    import torch
    import yaml
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "expert"
    command = ["train", selection, "--base", tiny_base, "-o", out, "--hold-out-shots", 2, "--device", "cpu", "--json"]
    command += ["--batch-size", 4, "--rank", 4, "--epochs", 4, "--learning-rate", 1e-2]
    result = xpert(*command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 25
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Training, steps: 28 done")
    assert len(lines) < 5  # nothing of trl's or transformers' own
    assert not list(tmp_path.glob(".expert*"))

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.arange(3, 40)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out)
    assert (adapted(ids).logits - before).abs().max() > 1e-3

    card = ExpertCard.read(out)
    figures = card.training["figures"]
    assert card.base.architecture == "LlamaForCausalLM"
    assert card.skills == ("arithmetic", "casing", "reversal", "colour", "city")
    assert sum(card.licences.values()) == 25
    assert set(card.licences) == {"MIT", "CC0-1.0"}
    assert card.selection["config"] == {"method": "kshot"}
    assert (figures["shots"], figures["held_out_shots"], figures["steps"]) == (6, 2, 28)
    assert figures["final_loss"] < figures["first_loss"]
    assert {"validation_loss_before", "validation_loss"} <= figures.keys()
    assert card.files == {p.name: hash_file(p) for p in out.iterdir() if p.name != "expert.json"}
    assert set(card.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "exemplars.jsonl",
        "report.html",
        "training.jsonl",
    }
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_base)
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    exemplars = [json.loads(line) for line in (out / "exemplars.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in exemplars] == ["shot"] * 8 + ["row"] * 19
    log = _log(out)
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 29))
    assert steps[-1]["tokens"] % 4 == 0  # four epochs of the same rows
    head = (out / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(head)["library_name"] == "peft"
    page = (out / "report.html").read_text()
    assert "<polyline" in page
    assert "http" not in page.replace("http://www.w3.org", "")

    again = xpert(*command)
    assert again.exit_code == 0
    assert "is trained already" in again.stderr
    assert json.loads(again.stdout) == json.loads(result.stdout)


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────


class Killed(Exception):
    pass


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Acts as soon as a step has ended, before its checkpoint."""
    from xpert.experts.training_callbacks import StepLog

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            act()

    monkeypatch.setattr(StepLog, "on_step_end", on_step_end, raising=False)


def _die() -> None:
    raise Killed


def test_validation_and_accumulation_resume_too(
    selection: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _options(hold_out_shots="0.5", gradient_accumulation=2, epochs=3.0)
    whole = train(selection, str(tiny_base), tmp_path / "whole", options, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        _at_step(patched, 5, _die)
        train(selection, str(tiny_base), tmp_path / "parts", options, device="cpu")
    parts = train(selection, str(tiny_base), tmp_path / "parts", options, device="cpu")
    assert _same(whole, parts)
    assert [r["validation_loss"] for r in _log(whole) if "validation_loss" in r] == pytest.approx(
        [r["validation_loss"] for r in _log(parts) if "validation_loss" in r], rel=1e-4
    )


@pytest.mark.parametrize("step", [2, 7, 10])
def test_a_killed_run_ends_with_the_same_weights(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps 1-6 are the first epoch, 7-12 the second; checkpoints after 3, 6, 9 and 12."""
    whole = train(source, str(tiny_base), tmp_path / "whole", _options(), device="cpu")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        _at_step(patched, step, _die)
        train(source, str(tiny_base), tmp_path / "parts", _options(), device="cpu")
    assert not (tmp_path / "parts").exists()
    train(source, str(tiny_base), tmp_path / "parts", _options(), device="cpu")
    assert _same(whole, tmp_path / "parts")
    assert not list(tmp_path.glob(".parts*"))
    logs = [
        [json.loads(line) for line in (f / "training.jsonl").read_text().splitlines()]
        for f in (whole, tmp_path / "parts")
    ]
    assert [(r["step"], r["tokens"]) for r in logs[0]] == [(r["step"], r["tokens"]) for r in logs[1]]
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-3)


def test_ctrl_c_keeps_the_work(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xpert: Callable[..., Result]
) -> None:
    arguments = ["train", source, "--base", tiny_base, "--device", "cpu", "--batch-size", 4, "--epochs", 2, "--rank", 4]
    assert xpert(*arguments, "-o", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patched:
        _at_step(patched, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        result = xpert(*arguments, "-o", tmp_path / "parts")
    assert result.exit_code == 130
    assert "Stopping after this step" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert not (tmp_path / "parts").exists()
    result = xpert(*arguments, "-o", tmp_path / "parts")
    assert result.exit_code == 0
    assert "Going on from step 5 of 12" in result.stderr
    assert _same(tmp_path / "whole", tmp_path / "parts")


def test_a_torn_checkpoint_is_passed_over(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(source, str(tiny_base), tmp_path / "whole", _options(), device="cpu")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        _at_step(patched, 8, _die)
        train(source, str(tiny_base), tmp_path / "parts", _options(), device="cpu")
    (work,) = tmp_path.glob(".parts.training-*")
    optimizer = work / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    assert checkpoints.last_checkpoint(work)[0] == work / "checkpoint-3"
    (work / "training.jsonl").write_bytes((work / "training.jsonl").read_bytes()[:-20])
    train(source, str(tiny_base), tmp_path / "parts", _options(), device="cpu")
    assert _same(whole, tmp_path / "parts")


def test_what_failed_in_writing_is_not_trained_again(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts import expert_folder
    from xpert.experts import train as module

    def fail(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(expert_folder, "model_card", fail)
        train(source, str(tiny_base), tmp_path / "out", _options(), device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "run_steps", fail)
    train(source, str(tiny_base), tmp_path / "out", _options(), device="cpu")
    assert ExpertCard.read(tmp_path / "out").training["figures"]["steps"] == 12


def test_another_configuration_starts_afresh(
    source: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xpert: Callable[..., Result]
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        _at_step(patched, 5, _die)
        train(source, str(tiny_base), tmp_path / "out", _options(), device="cpu")
    arguments = ["train", source, "--base", tiny_base, "--device", "cpu", "--max-steps", 2, "-o", tmp_path / "out"]
    result = xpert(*arguments)
    assert result.exit_code == 0
    assert "Another configuration's unfinished work is kept" in result.stderr
    assert "Going on" not in result.stderr
    assert not list(tmp_path.glob(".out*"))
    taken = xpert(*arguments, "--seed", 1)
    assert taken.exit_code == 2
    assert "the output exists already" in taken.stderr


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        checkpoints.work_folder(tmp_path / "out", "k"),
        pytest.raises(BadInput, match="another process"),
        checkpoints.work_folder(tmp_path / "out", "k"),
    ):
        pass


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_no_number_stops(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"not a number at step 1 \(rows (r\d+(, )?){4}\). Lower --learning-rate"):
        train(source, str(base), tmp_path / "out", _options(), device="cpu")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"SELECTION": "nothing.jsonl"}, 2, "nothing.jsonl"),
        ({"SELECTION": "empty.jsonl"}, 2, "empty.jsonl"),
        ({"--base": "no-such.gguf"}, 2, "no such GGUF file"),
        ({"--base": "empty-folder"}, 2, "has no config.json"),
        ({"--base": "someone/no-such-model"}, 3, "the hub is not reachable"),
        (
            {"--max-length": "8"},
            2,
            "all 22 rows are longer than 8 tokens before their answer begins. Raise --max-length",
        ),
        ({"--max-length": "7"}, 2, "max-length is 7; the least is 8"),
        ({"--rank": "0"}, 2, "rank is 0; the least is 1"),
        ({"--learning-rate": "0"}, 2, "learning-rate is 0"),
        ({"--epochs": "0"}, 2, "epochs is 0"),
        ({"--scheduler": "cosin"}, 2, "Did you mean 'cosine'?"),
        ({"--target-modules": "q_proj,lm_head"}, 2, "may not hold lm_head"),
        ({"--target-modules": "query"}, 2, "It has down_proj, gate_proj, k_proj"),
        ({"--hold-out-shots": "2"}, 2, "the selection has no shots"),
        ({"--device": "cuda:9"}, 3, "CUDA"),
        ({"--device": "gpu"}, 2, "unknown device 'gpu'"),
        ({"-o": "taken"}, 2, "the output exists already"),
        ({"-o": "empty.jsonl/x"}, 2, "a part of the path is a file"),
    ],
)
def test_mistakes(
    source: Path,
    tiny_base: Path,
    tmp_path: Path,
    xpert: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    given = {"SELECTION": str(source), "--base": str(tiny_base), "-o": "out"} | changes
    arguments = [given.pop("SELECTION"), *(part for pair in given.items() for part in pair)]
    result = xpert("train", *arguments)
    assert result.exit_code == status, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_help_is_quick_to_import() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from xpert.commands.train import command; "
        "assert not {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
