"""The examples run, here on the tiny model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_select_train_route(
    columns: Callable[..., list[dict[str, Any]]],
    write_jsonl: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("select_train_route", EXAMPLES / "select_train_route.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
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
