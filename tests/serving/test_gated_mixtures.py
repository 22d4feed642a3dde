"""A mixture behind a token gate: in its file, at the command line, in the runner, in evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import save_file

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.mixture import GateChoice
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.experts.serving import EngineChoice, MixtureRunner
from xpert.protocols import Sampling
from xpert.storage import hash_file

Run = Callable[..., Result]


@pytest.fixture
def mixed(mixture_file: Callable[..., Path]) -> Path:
    """A mixture file of all experts behind router `fixed`."""
    return mixture_file(router="fixed")


def gated(path: Path, gate: dict[str, Any] | None) -> Path:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | ({"schema": 2, "gate": gate} if gate else {})))
    return path


def test_a_gate_survives_its_file(mixed: Path, tmp_path: Path) -> None:
    gated(mixed, {"name": "arrow", "params": {"top": 1}, "file": None, "fingerprint": None})
    mixture = load_mixture(mixed)
    assert mixture.gate == GateChoice("arrow", {"top": 1})
    copy = mixed.parent / "copy.json"
    write_mixture(copy, mixture)
    assert load_mixture(copy).gate == mixture.gate
    assert json.loads(copy.read_text())["schema"] == 2


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ({"name": "arow"}, NotFound, "Did you mean 'arrow'"),
        ({"name": "arrow", "params": {"tops": 1}}, BadInput, "Did you mean 'top'"),
        ({"name": "top-p", "file": "./gone.safetensors", "fingerprint": "0"}, NotFound, "gone.safetensors is not here"),
        (
            {"name": "top-p", "file": "./here.safetensors", "fingerprint": "0"},
            Corrupt,
            "is not the one that was trained",
        ),
    ],
)
def test_gates_that_are_wrong(mixed: Path, gate: dict[str, Any], error: type[Exception], message: str) -> None:
    import torch

    save_file({"x": torch.zeros(1)}, mixed.parent / "here.safetensors")
    with pytest.raises(error, match=message):
        load_mixture(gated(mixed, gate))


def test_a_router_without_its_experts_is_damaged(mixed: Path) -> None:
    import torch

    file = mixed.parent / "gate.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    gate = {"name": "top-p", "params": {}, "file": "./gate.safetensors", "fingerprint": hash_file(file)}
    with pytest.raises(Corrupt, match="the gate's router is damaged"):
        MixtureRunner.open(load_mixture(gated(mixed, gate)), device="cpu")


def test_the_runner_gates_what_is_routed_and_nothing_else(mixed: Path, rows: Any) -> None:
    mixture = load_mixture(gated(mixed, {"name": "arrow", "params": {"top": 1}, "file": None, "fingerprint": None}))
    runner = MixtureRunner.open(mixture, device="cpu")
    route = runner.answer(rows[:1], Sampling(max_tokens=2))[0].route
    assert route.reason.endswith("; gate arrow weighs them at every token")
    routed = runner.engine_request("r", rows[0].messages, route.experts, Sampling())
    assert routed.gate == "mixture" and {weight for _, weight in routed.experts} == {1.0}
    named = runner.engine_request("n", rows[0].messages, ((mixture.keys[0], 1.0),), Sampling(), gated=False)
    assert named.gate is None
    runner.close()


def test_glider_gets_its_cosines_from_the_mixtures_exemplars(mixed: Path, rows: Any) -> None:
    mixture = load_mixture(gated(mixed, {"name": "glider", "params": {}, "file": None, "fingerprint": None}))
    runner = MixtureRunner.open(mixture, device="cpu")
    routed = runner.engine_request("r", rows[0].messages, ((mixture.keys[0], 0.5), (mixture.keys[1], 0.5)), Sampling())
    assert [key for key, _ in routed.gate_bias] == list(mixture.keys[:2])
    assert all(-1 <= cosine <= 1 for _, cosine in routed.gate_bias)


def test_mix_and_run_behind_a_gate(mixed: Path, tmp_path: Path, xpert: Run, write_jsonl: Any, columns: Any) -> None:
    prompts = write_jsonl("p.jsonl", columns(3))
    gated(mixed, {"name": "arrow", "params": {"top": 1}, "file": None, "fingerprint": None})
    result = xpert("run", mixed, "--prompts", prompts, "-o", tmp_path / "o.jsonl", "--max-tokens", 2, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "gate arrow" in (tmp_path / "o.jsonl").read_text()
    small = xpert(
        *("run", mixed, "--prompts", prompts, "-o", tmp_path / "s.jsonl", "--quiet"),
        *("--engine-param", "device-experts=1"),
    )
    assert small.exit_code == 2 and "it holds 1 expert: they never fit" in small.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gate-param", "top=2"), "--gate-param needs a gate"),
        (("--gate", "arow"), "Did you mean 'arrow'?"),
        (("--gate", "arrow", "--gate-param", "tops=2"), "Did you mean 'top'?"),
        (("--gate", "top-p"), "gate top-p has a router that is trained for a mixture"),
    ],
)
def test_gates_that_mix_refuses(xpert: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = xpert("mix", "-o", tmp_path / "m.json", *arguments)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (EngineChoice("torch-lorra"), NotFound, "Did you mean 'torch-lora'"),
        (EngineChoice(params={"storage": "int9"}), BadInput, "Did you mean 'int8'"),
        (EngineChoice(params={"device-expert": "1"}), BadInput, "Did you mean 'device_experts'|'device-experts'"),
    ],
)
def test_engines_that_are_wrong(choice: EngineChoice, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choice.options()


def test_a_gate_whose_vectors_an_expert_lacks(xpert: Run, mixed: Path, tmp_path: Path) -> None:
    folders = ",".join(str(expert.folder) for expert in load_mixture(mixed).experts)
    result = xpert("mix", "--experts", folders, "--gate", "glider", "-o", tmp_path / "m.json", "--quiet")
    assert result.exit_code == 2
    assert "has no phatgoose vectors, which gate glider needs" in result.stderr


def test_an_engine_without_gates(mixed: Path) -> None:
    mixture = load_mixture(gated(mixed, {"name": "arrow", "params": {}, "file": None, "fingerprint": None}))
    with pytest.raises(BadInput, match="engine vllm-engine has no token gates, and the mixture has arrow"):
        MixtureRunner.open(mixture, device="cpu", engine=EngineChoice("vllm-engine"))
