"""Merges as folders: what plain peft and the engine make of them, and the commands that write them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from xpert.experts.engines.torch_lora import TorchEngine
from xpert.experts.merge_folder import write_merge
from xpert.experts.merge_sources import read_sources, shots_loss
from xpert.experts.merging import merge
from xpert.experts.mixture import assemble, open_expert
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.language_model import LanguageModel, load_model
from xpert.protocols import EngineRequest
from xpert.records import Row, Shots
from xpert.registry.card import ExpertCard
from xpert.registry.card_schema import check_card

Run = Callable[..., Result]
WEIGHTS = {"a": 0.5, "b": 0.3, "c": -0.4, "d": 0.25}
PROMPT, ANSWER = tuple(range(40, 52)), tuple(range(60, 72))


@pytest.fixture(scope="session")
def lm(tiny_base: Path) -> LanguageModel:
    return load_model(str(tiny_base), device="cpu")


@pytest.fixture
def refs(experts: dict[str, Path]) -> list[str]:
    return [f"{experts[key]}={weight}" for key, weight in WEIGHTS.items()]


@pytest.fixture
def mixture(experts: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "mixture.json"
    write_mixture(path, assemble([open_expert(experts[key]) for key in "abcd"], router="centroid"))
    return path


def told(lm: LanguageModel, folders: dict[str, Path], weights: dict[str, float]) -> list[float]:
    """The engine's log-probabilities of a fixed answer under weighted experts."""
    engine = TorchEngine(lm)
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    return engine.continuation_logprobs([EngineRequest("r", PROMPT, tuple(weights.items()))], [ANSWER])[0]


def peft_told(tiny_base: Path, folder: Path) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *ANSWER]])).logits[0, len(PROMPT) - 1 : -1]
    return [float(line[token]) for line, token in zip(logits.log_softmax(-1), ANSWER, strict=True)]


@pytest.mark.parametrize(
    ("method", "more"), [("concat", ()), ("task-arithmetic", ()), ("svd", ("--rank", 3)), ("ties", ()), ("dare", ())]
)
def test_plain_peft_and_the_engine_agree_on_a_merge(
    method: str,
    more: tuple[Any, ...],
    refs: list[str],
    experts: dict[str, Path],
    lm: LanguageModel,
    tiny_base: Path,
    tmp_path: Path,
    xpert: Run,
) -> None:
    result = xpert("merge", *refs, "--method", method, *more, "-o", tmp_path / "m", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    ours = told(lm, {"m": tmp_path / "m"}, {"m": 1.0})
    assert ours == pytest.approx(peft_told(tiny_base, tmp_path / "m"), abs=1e-4)
    card = ExpertCard.read(tmp_path / "m")
    summary = json.loads(result.stdout)["merges"][0]
    assert card.training["error"]["total"] == summary["error"]
    assert {line["key"]: line["weight"] for line in card.training["experts"]} == WEIGHTS
    assert card.licences == {"MIT": 8}
    check_card(card.to_dict(), "here")
    assert card.spent == {}  # the experts do not say what they took
    if method in ("concat", "task-arithmetic"):
        assert summary["error"] < 1e-6
        assert ours == pytest.approx(told(lm, experts, WEIGHTS), abs=1e-4)
    else:
        assert summary["error"] > 0.01


def test_a_merge_can_be_published_profiled_and_mixed(
    refs: list[str], tmp_path: Path, xpert: Run, write_jsonl: Callable[..., Path], columns: Callable[..., Any]
) -> None:
    assert xpert("merge", *refs, "-o", tmp_path / "m", "--quiet").exit_code == 0
    suite = write_jsonl("suite.jsonl", [{**row, "answers": [row["output"]], "metric": "exact"} for row in columns(2)])
    for line in (
        ("profile", tmp_path / "m", "--suite", suite, "--max-tokens", 2),
        ("registry", "publish", tmp_path / "m", "--name", "me/m"),
    ):
        result = xpert(*line, "--quiet")
        assert result.exit_code == 0, result.stderr
    assert "merged of (weight) | a (0.5)" in (tmp_path / "m" / "README.md").read_text()
    assert load_mixture(tmp_path / "m").keys == ("m",)


def test_methods_are_compared_without_writing(refs: list[str], xpert: Run) -> None:
    result = xpert("merge", *refs, "--method", "svd,concat,ties", "--rank", 2, "--param", "density=0.5")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "svd", "ties", "concat:"]
    assert "concat keeps every rank" in lines[-1]


def test_weights_without_numbers_sum_to_one(mixture: Path, experts: dict[str, Path]) -> None:
    assert read_sources([str(mixture)]).weights == (0.25,) * 4
    assert read_sources([str(experts["a"]), str(experts["b"])]).weights == (0.5, 0.5)
    assert read_sources([f"{mixture}=2"]).weights == (0.5,) * 4


def test_the_shots_loss_is_that_of_the_merge(
    experts: dict[str, Path], rows: list[Row], lm: LanguageModel, refs: list[str], tmp_path: Path, xpert: Run
) -> None:
    xpert("merge", *refs, "-o", tmp_path / "m", "--quiet")
    engine = TorchEngine(lm)
    for key, folder in {**experts, "m": tmp_path / "m"}.items():
        engine.add_expert(key, folder)
    shots = Shots(tuple(rows[:4]))
    apart = shots_loss(lm, engine, tuple(WEIGHTS), shots)(tuple(WEIGHTS.values()))
    assert apart == pytest.approx(shots_loss(lm, engine, ("m",), shots)([1.0]), abs=1e-4)


def test_lorahub_fits_the_shots(
    experts: dict[str, Path], tmp_path: Path, xpert: Run, write_jsonl: Callable[..., Path], columns: Callable[..., Any]
) -> None:
    shots = write_jsonl("shots.jsonl", columns(3))
    line = ("merge", experts["a"], experts["c"], "--method", "lorahub", "--param", "evaluations=8", "--shots", shots)
    result = xpert(*line, "--json", "--quiet")
    found = json.loads(result.stdout or "{}")
    if result.exit_code == 2:  # random experts may not help at all
        assert "does better on the shots than the base model alone" in result.stderr
    else:
        assert set(found["merges"][0]["weights"]) == {"a", "c"}


def usage_log(path: Path) -> Path:
    lines = (
        [({"a": 1.0}, (1, 0.9, 0, 0))] * 6 + [({"b": 1.0}, (0.9, 1, 0, 0))] * 3 + [({"c": 1.0}, (0, 0, 1, 0.8))] * 11
    )
    text = ""
    for index, (drawn, scores) in enumerate(lines):
        route = {
            "id": str(index),
            "experts": [{"expert": key, "weight": weight} for key, weight in drawn.items()],
            "candidates": [{"expert": key, "score": score} for key, score in zip("abcd", scores, strict=True)],
        }
        text += json.dumps(route) + "\n"
    path.write_text(text)
    return path


def test_pruning_by_usage(mixture: Path, tmp_path: Path, xpert: Run) -> None:
    log = usage_log(tmp_path / "log.jsonl")
    result = xpert("prune", mixture, "--usage", log, "-o", tmp_path / "small", "--below", 0.2, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fate"] == {"a": "a", "b": None, "c": "c", "d": None}
    assert found["usage"] == {"a": 0.3, "b": 0.15, "c": 0.55, "d": 0.0}
    assert load_mixture(tmp_path / "small").keys == ("a", "c")


def test_pruning_by_task_merges_alike_experts_and_scores_both(
    mixture: Path,
    experts: dict[str, Path],
    lm: LanguageModel,
    tmp_path: Path,
    xpert: Run,
    write_jsonl: Callable[..., Path],
    columns: Callable[..., Any],
) -> None:
    log = usage_log(tmp_path / "log.jsonl")
    suite = write_jsonl("suite.jsonl", [{**row, "answers": [row["output"]], "metric": "exact"} for row in columns(2)])
    line = ("prune", mixture, "--usage", log, "--method", "task", "--groups", 2, "--suite", suite, "--quiet", "--json")
    result = xpert(*line, "-o", tmp_path / "small")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fate"] == {"a": "a+1", "b": "a+1", "c": "c", "d": None}
    assert set(found["scores"]) == {"before", "after"}
    moved = shutil.move(tmp_path / "small", tmp_path / "elsewhere")
    smaller = load_mixture(moved)
    assert smaller.keys == ("a+1", "c")
    ours = told(lm, {"m": smaller.experts[0].folder}, {"m": 1.0})
    assert ours == pytest.approx(told(lm, experts, {"a": 2 / 3, "b": 1 / 3}), abs=1e-4)


def test_a_grouped_merge_is_a_pool(mixture: Path, tmp_path: Path, xpert: Run) -> None:
    result = xpert("merge", mixture, "--method", "grouped", "-o", tmp_path / "pool", "--quiet")
    assert result.exit_code == 0, result.stderr
    pool = load_mixture(tmp_path / "pool")
    fate = json.loads((tmp_path / "pool" / "pruning.json").read_text())
    assert len(pool.keys) == 2 and set(fate) == set("abcd") and set(fate.values()) == set(pool.keys)


@pytest.mark.parametrize("start", ["merged", "base"])
def test_a_student_comes_nearer_to_its_teachers(
    start: str, experts: dict[str, Path], tiny_base: Path, rows: list[Row], lm: LanguageModel, tmp_path: Path
) -> None:
    from xpert.experts.distil_options import DistilOptions
    from xpert.experts.distilling import distil

    sources = read_sources([f"{experts['a']}=0.6", f"{experts['b']}=0.4"])
    options = DistilOptions(rank=4, start=start, learning_rate=1e-2, epochs=4, batch_size=8)
    found = [distil(sources, rows[:40], tmp_path / name, options, device="cpu") for name in ("one", "two")]
    log = found[0].merged.log
    assert log["kl"] < 0.9 * log["kl_before"] and log["measured_rows"] == 4
    assert all(
        torch.equal(update.b, found[1].merged.modules[name].b) for name, update in found[0].merged.modules.items()
    )
    assert told(lm, {"s": tmp_path / "one"}, {"s": 1.0}) == pytest.approx(
        peft_told(tiny_base, tmp_path / "one"), abs=1e-4
    )


def test_an_exact_student_has_nothing_to_learn(experts: dict[str, Path], rows: list[Row], tmp_path: Path) -> None:
    from xpert.experts.distil_options import DistilOptions
    from xpert.experts.distilling import distil

    sources = read_sources([f"{experts['a']}=0.6", f"{experts['c']}=0.4"])
    options = DistilOptions(rank=64, epochs=1, learning_rate=1e-9)
    assert distil(sources, rows[:6], tmp_path / "s", options, device="cpu").merged.log["kl_before"] < 1e-5


def test_a_mixture_is_distilled_from_the_command_line(
    mixture: Path, tmp_path: Path, xpert: Run, write_jsonl: Callable[..., Path], columns: Callable[..., Any]
) -> None:
    found = write_jsonl("rows.jsonl", columns(4))
    router = json.loads(mixture.read_text()) | {"router": "random", "router_params": {}}
    mixture.write_text(json.dumps(router))
    result = xpert("distil", mixture, "--rows", found, "--epochs", 1, "--rank", 2, "-o", tmp_path / "s", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "KL from the teachers" in result.stdout
    card = ExpertCard.read(tmp_path / "s")
    check_card(card.to_dict(), "here")
    assert card.selection["rows"] == 4 and card.licences == {"MIT": 10, "CC0-1.0": 2}


def test_a_merge_adds_to_what_its_experts_took(experts: dict[str, Path], tmp_path: Path, xpert: Run) -> None:
    refs = []
    for key in "ab":
        folder = Path(shutil.copytree(experts[key], tmp_path / key))
        dataclasses.replace(ExpertCard.read(folder), spent={"tokens": 100, "seconds": 2.5}).write(folder)
        refs.append(folder)
    result = xpert("merge", *refs, "--method", "svd", "-o", tmp_path / "m", "--quiet")
    assert result.exit_code == 0, result.stderr
    spent = ExpertCard.read(tmp_path / "m").spent
    assert spent["tokens"] == 200 and spent["seconds"] >= 5

    # lorahub reads the base model over and over and does not count the tokens: then no sum of them is known.
    sources = read_sources([str(ref) for ref in refs])
    (made,) = merge(sources.task(rank=None, seed=0), "svd")
    write_merge(tmp_path / "l", [dataclasses.replace(made, method="lorahub")], sources)
    assert set(ExpertCard.read(tmp_path / "l").spent) == {"seconds"}


def test_a_gated_mixture_teaches_behind_its_gate(mixture: Path, rows: list[Row], tmp_path: Path) -> None:
    """A student of unlimited rank that copies the sum of the experts is not what the gate makes of them."""
    from xpert.experts.distil_options import DistilOptions
    from xpert.experts.distilling import distil

    def diverges(name: str, gate: dict[str, Any]) -> float:
        mixture.write_text(json.dumps(plain | {"schema": 2, "gate": {"name": gate["name"], "params": gate["params"]}}))
        options = DistilOptions(rank=200, epochs=1, learning_rate=1e-9, hold_out=0)
        result = distil(read_sources([str(mixture)]), rows[:6], tmp_path / name, options, device="cpu")
        return float(result.merged.log["kl_before"])

    plain = json.loads(mixture.read_text()) | {"router": "fixed", "router_params": {}}
    plain["experts"] = plain["experts"][:2]  # both adapt all modules, so that each has half of every module
    assert diverges("one", {"name": "arrow", "params": {"top": 1}}) > 1e-4
    assert diverges("all", {"name": "arrow", "params": {"top": 0, "temperature": 1e6}}) < 1e-5


MISTAKES = {
    "merge {a} {d}/nope": "nope: no such mixture or expert",
    "merge {a}=0.5 {b}": "has no weight, but others have one",
    "merge {a}=x {b}=1": "the weight 'x' of",
    "merge {a}=nan {b}=1": "is nan. Weights are finite numbers",
    "merge {a}=0 {b}=0": "all weights are zero",
    "merge {a} {a}": "two experts of the mixture are called 'a'",
    "merge {a} {other}": "experts of different bases cannot be mixed",
    "merge {a} {b} --method svdd": "Did you mean 'svd'?",
    "merge {a} {b} --method svd --param density=1": "unknown parameter 'density'",
    "merge {a} {b} --method svd,ties -o {d}/o": "several methods are compared, not written",
    "merge {a} {b} --method svd --shots {log}": "--shots is not read by svd",
    "merge {a} {b} --method lorahub": "Give --shots FILE",
    "merge {a} {b} --method grouped --usage {d}/nope": "nope: no such file",
    "merge {a} {b} --method grouped --usage {log}": "unknown expert 'c'",
    "merge {a} {b} --rank 3 -o {d}/o": "concat keeps every rank",
    "merge {a} {b} -o {a}": "the output exists already",
    "prune {mixture} -o {d}/o": "give one of --prompts FILE and --usage FILE",
    "prune {mixture} --usage {log} --below 0.9 -o {d}/o": "'c', the most used, has 55.0 %",
    "prune {mixture} --usage {log} --below 0 -o {d}/o": "'d', the least used, has 0.0 %",
    "prune {mixture} --usage {log} --groups 2 -o {d}/o": "groups and rank belong to method=task",
    "prune {mixture} --usage {mixture} -o {d}/o": "line 1 is no route",
    "distil {a} --rows {d}/nope -o {d}/o": "no such file",
    "distil {a} --rows {log} --temperature 0 -o {d}/o": "temperature is 0.0",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_told_in_a_line(
    line: str, experts: dict[str, Path], mixture: Path, tmp_path: Path, xpert: Run
) -> None:
    other = Path(shutil.copytree(experts["b"], tmp_path / "other"))
    card = json.loads((other / "expert.json").read_text())
    card["base"]["fingerprint"] = "0" * 64
    (other / "expert.json").write_text(json.dumps(card | {"name": "other"}))
    places = {**experts, "d": tmp_path, "mixture": mixture, "other": other, "log": usage_log(tmp_path / "log.jsonl")}
    result = xpert(*line.format(**places).split(), "--quiet")
    assert result.exit_code == 2, result.output
    assert MISTAKES[line].lower() in result.stderr.lower()
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
