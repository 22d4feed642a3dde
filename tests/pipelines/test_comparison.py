"""Several methods in one command: each folder a selection, one report beside three random draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from xpert.selection import read_selection

Run = Callable[..., Result]


@pytest.fixture
def given(columns: Any, write_jsonl: Any) -> list[Any]:
    pool = write_jsonl("pool.jsonl", columns(120))
    shots = write_jsonl("shots.jsonl", columns(4, seed=9, skills=("arithmetic",)))
    return [pool, "--shots", shots, "--budget", "12", "--quiet"]


def test_methods_are_compared_beside_random_draws(xpert: Run, given: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = xpert("select", *given, "--method", "kshot,facility", "-p", "kshot.tau=1", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    names = ["kshot", "facility", "random-1", "random-2", "random-3"]
    assert list(value["methods"]) == names
    folders = {name: read_selection(out / name) for name in names}
    assert folders["kshot"].manifest["config"]["params"]["tau"] == 1.0
    assert len({tuple(row.id for row in folders[f"random-{n}"].rows) for n in (1, 2, 3)}) == 3
    ids = {name: {row.id for row in folder.rows} for name, folder in folders.items()}
    for i, one in enumerate(names):
        for j, two in enumerate(names):
            assert value["overlap"][i][j] == pytest.approx(len(ids[one] & ids[two]) / 12)
    assert value["methods"]["kshot"]["skills"] == {"arithmetic": 12}
    assert value["methods"]["facility"]["coverage"] > value["methods"]["kshot"]["coverage"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*names, "arithmetic"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "comparison"
    assert np.array(manifest["figures"]["overlap"]).shape == (5, 5)


def test_a_comparison_s_row_is_the_method_alone(xpert: Run, given: list[Any], tmp_path: Path) -> None:
    assert xpert("select", *given, "--method", "kshot,mmr", "-o", tmp_path / "both").exit_code == 0
    assert xpert("select", *given, "--method", "mmr", "-o", tmp_path / "one").exit_code == 0
    ids = [[row.id for row in read_selection(path).rows] for path in (tmp_path / "both" / "mmr", tmp_path / "one")]
    assert ids[0] == ids[1]


def test_a_comparison_made_again_costs_what_it_cost(xpert: Run, given: list[Any], tmp_path: Path) -> None:
    command = ("select", *given, "--method", "kshot,mmr", "-o", tmp_path / "out")
    costs = []
    for _ in range(2):
        assert xpert(*command).exit_code == 0
        costs.append(json.loads((tmp_path / "out" / "manifest.json").read_text())["timings"])
    assert costs[0] == costs[1]
    assert len(costs[0]) == 5


def test_a_stopped_comparison_goes_on(xpert: Run, given: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert xpert("select", *given, "--method", "kshot,mmr", "-o", out).exit_code == 0
    before = (out / "kshot" / "manifest.json").read_bytes()
    for name in ("manifest.json", "report.html"):
        (out / name).unlink()
    (out / "mmr" / "manifest.json").unlink()
    (out / "mmr").rename(tmp_path / "gone")
    result = xpert("select", *given, "--method", "kshot,mmr", "-o", out)
    assert result.exit_code == 0, result.stderr
    # What a selection found again had cost is not known, and not nothing.
    seconds = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines()[1:6]}
    assert seconds["kshot"] == "-"
    assert float(seconds["mmr"]) > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["timings"]) == ["mmr"]
    assert manifest["figures"]["methods"]["kshot"]["cpu_seconds"] is None
    assert (out / "kshot" / "manifest.json").read_bytes() == before
    assert (out / "mmr" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "kshot,kshot"], "named twice"),
        (["--method", "kshot,random-2"], "named twice"),
        (["--method", "kshot,facilty"], "Did you mean 'facility'"),
        (["--method", "kshot,mmr", "-p", "tau=1"], "does not say of which method. Write kshot.tau=1"),
        (["--method", "kshot,mmr", "-p", "kmq.share=equal"], "unknown method in the parameters 'kmq'"),
        (["--method", "kshot,mmr", "-p", "kshot.tua=1"], "Did you mean 'tau'"),
        (["--method", "kshot,mmr", "--explain"], "--explain is of one method"),
    ],
)
def test_mistakes(arguments: list[str], said: str, xpert: Run, given: list[Any], tmp_path: Path) -> None:
    result = xpert("select", *given, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(xpert: Run, given: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = xpert("select", *given, "--method", "kshot,mmr", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
