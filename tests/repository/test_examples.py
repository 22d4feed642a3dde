"""The examples run, here on the tiny model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert import plugins
from xpert.experts.engines.torch_lora import TorchEngine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_select_train_route(
    columns: Callable[..., list[dict[str, Any]]],
    write_jsonl: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load("select_train_route")
    pool = write_jsonl("pool.jsonl", columns(100))
    shots = write_jsonl("shots.jsonl", columns(8, seed=5, skills=("casing",)))
    prompts = write_jsonl("prompts.jsonl", columns(3, seed=6, skills=("casing",)))
    out = tmp_path / "out"
    example.main(
        [
            "--pool",
            str(pool),
            "--shots",
            str(shots),
            "--base",
            str(tiny_base),
            "--prompts",
            str(prompts),
            "-o",
            str(out),
            "--budget",
            "10",
            "--steps",
            "2",
        ]
    )
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 3
    assert (out / "mixture.json").is_file()


@pytest.mark.skipif(
    not hasattr(TorchEngine, "add_gate") or "arrow" not in plugins.names("gate"),
    reason="the engine has no gates yet, or there is no Arrow",
)
def test_mixture_in_python(
    tiny_base: Path, make_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line is that of a request of its own: the base differs from the experts, and they from their mean."""
    folders = [make_adapter(seed=1), make_adapter(seed=2)]
    load("mixture_in_python").main(
        ["--base", str(tiny_base), "--experts", *map(str, folders), "--prompt", "Name the colour", "--max-tokens", "8"]
    )
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.strip().splitlines())
    assert list(printed) == ["base", *sorted(folder.name for folder in folders), "mean", "gated"]
    assert len(set(printed.values())) == 5
