"""`xpert select` and `xpert methods` as a user meets them: the folder, the same bytes again, and mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from xpert import plugins
from xpert.data import read_rows
from xpert.errors import BadInput, Corrupt
from xpert.selection import read_selection, select

Run = Callable[..., Result]
PLAIN = [
    name
    for name in plugins.names("selector")
    if not plugins.load("selector", name).needs & {"base", "judge"}
    and name != "qurating"  # learns from a file of pairs
]


@pytest.fixture
def source(columns: Any, write_jsonl: Any) -> Path:
    path: Path = write_jsonl("pool.jsonl", columns(150))
    return path


@pytest.fixture
def shots(columns: Any, write_jsonl: Any) -> Path:
    """Four rows of one skill that are not in the pool, and one that is."""
    own = columns(150)[0]
    path: Path = write_jsonl("shots.jsonl", [*columns(4, seed=9, skills=("arithmetic",)), own])
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_what_was_chosen_and_how(xpert: Run, source: Path, shots: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = xpert("select", source, "--shots", shots, "--budget", "20", "-o", out, "--clusters", 5, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["rows"] == 20
    assert said["skills"]["arithmetic"] >= 15
    chosen = lines(out / "selected.jsonl")
    assert [row["_xpert"]["rank"] for row in chosen] == list(range(1, 21))
    assert all({"score", "reason", "cluster", "id"} <= set(row["_xpert"]) for row in chosen)
    written = {row["id"]: row for row in lines(source)}
    for row in chosen:
        mark = row.pop("_xpert")
        assert row == written[mark["id"]]
        assert mark["id"] != "r00000"  # it is a shot
    assert [row["id"] for row in lines(out / "left_out.jsonl")] == ["r00000"]
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")

    found = read_selection(out)
    assert [row.columns["id"] for row in found.rows] == [row["id"] for row in chosen]
    assert found.shots is not None
    assert len(found.shots) == 5
    assert found.figures["rows"] == 20
    assert found.manifest["config"]["params"]["tau"] == 0.9
    # Both files are rows like any other, to be read again.
    assert [row.response for row in read_rows(out / "rows.jsonl")] == [row.response for row in found.rows]
    assert len(read_rows(out / "shots.jsonl")) == 5


@pytest.mark.parametrize("method", PLAIN)
def test_the_same_selection_is_the_same_bytes(method: str, source: Path, shots: Path, tmp_path: Path) -> None:
    one, two = (
        select(source, shots=shots, method=method, budget="10%", out=tmp_path / name, report=False) for name in "ab"
    )
    for name in ("selected.jsonl", "rows.jsonl", "shots.jsonl"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    assert len(one.rows) == 15


def test_finished_work_is_recognised(xpert: Run, source: Path, shots: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("select", source, "--shots", shots, "--budget", "5", "-o", out, "--no-report")
    assert xpert(*command).exit_code == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    again = xpert(*command)
    assert again.exit_code == 0
    assert "already" in again.stderr
    assert (out / "manifest.json").stat().st_mtime_ns == before
    other = xpert(*command, "--seed", 1)
    assert other.exit_code == 2
    assert "another -o" in other.stderr

    (out / "selected.jsonl").write_text("")
    with pytest.raises(Corrupt, match="changed"):
        read_selection(out)
    (out / "selected.jsonl").unlink()
    assert xpert(*command).exit_code == 2


def test_tokens_are_counted(xpert: Run, source: Path, shots: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = xpert("select", source, "--shots", shots, "--budget", "60tok", "-o", out, "--no-report", "--json")
    figures = json.loads(result.stdout)
    assert 57 < figures["tokens"] <= 60
    assert "estimated" in figures["tokens_unit"]


def test_explained(xpert: Run, source: Path, shots: Path, tmp_path: Path) -> None:
    result = xpert(
        "select", source, "--shots", shots, "--budget", "5", "-o", tmp_path / "o", "--no-report", "--explain"
    )
    assert "to shot" in result.stdout
    assert "step repeats" in result.stdout


def test_parameters_from_a_file(xpert: Run, source: Path, shots: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"method": "mmr", "budget": "7", "params": {"relevance": 0.4}}))
    command = ("select", source, "--shots", shots, "--config", config, "--no-report")
    assert xpert(*command, "-o", tmp_path / "a").exit_code == 0
    found = read_selection(tmp_path / "a")
    assert (found.manifest["config"]["method"], found.manifest["config"]["params"]["relevance"]) == ("mmr", 0.4)
    assert len(found.rows) == 7
    assert xpert(*command, "-o", tmp_path / "b", "--method", "random", "--param", "x=1").exit_code == 2


def test_a_quality_column(source: Path, tmp_path: Path, columns: Any, write_jsonl: Any) -> None:
    rows = [{**row, "stars": index % 3} for index, row in enumerate(columns(60))]
    params = {"quality": "column", "quality-column": "stars"}
    good = write_jsonl("stars.jsonl", rows)
    found = select(good, method="kmq", params=params, budget="20", out=tmp_path / "o", report=False)
    assert sum(row.columns["stars"] == 0 for row in found.rows) <= 2
    with pytest.raises(BadInput, match=r"r00000.*'stars' is missing"):
        select(source, method="kmq", params=params, budget="20", out=tmp_path / "p", report=False)


MISTAKES: list[tuple[list[str], str]] = [
    (["--budget", "0"], "selects nothing"),
    (["--budget=-5%"], "is negative"),
    (["--budget", "many"], "is not understood"),
    (["--budget", "151"], "pool holds"),
    (["--budget", "101%"], "more than the whole pool"),
    (["--budget", "9mtok"], "pool holds"),
    (["--budget", "5", "--method", "kshto"], "Did you mean 'kshot'"),
    (["--budget", "5", "--param", "taw=0.8"], "Did you mean 'tau'"),
    (["--budget", "5", "--param", "tau=2"], "the most is 1"),
    (["--budget", "5", "--param", "tau=high"], "must be a number"),
    (["--budget", "5", "--param", "tau"], "is not KEY=VALUE"),
    (["--budget", "5", "--method", "mmr", "--param", "relevance=-1"], "the least is 0"),
    (["--budget", "5", "--method", "kmq", "--param", "quality=column"], "go together"),
    (["--budget", "5", "--method", "facility", "--param", "eta=2"], "eta has no part in mode cells"),
    (["--budget", "5", "--param", "refill=false", "--param", "reach=3"], "reach has no part without refill"),
    (["--budget", "5", "--embedder", "lsaa"], "Did you mean 'lsa'"),
    (["--budget", "5", "--shots", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--budget", "5", "--bugdet", "6"], "--budget"),
    ([], "--budget"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(a) or "no budget" for a, _ in MISTAKES])
def test_mistakes(xpert: Run, source: Path, shots: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    given = arguments if "--shots" in arguments else ["--shots", str(shots), *arguments]
    result = xpert("select", source, "-o", tmp_path / "out", *given)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    last = result.stderr.strip().splitlines()[-1]
    assert said in last
    assert not (tmp_path / "out").exists()


def test_shots_that_are_missing_or_are_the_whole_pool(xpert: Run, source: Path, tmp_path: Path) -> None:
    without = xpert("select", source, "--budget", 5, "-o", tmp_path / "o")
    assert without.exit_code == 2
    assert "needs shots" in without.stderr
    same = xpert("select", source, "--shots", source, "--budget", 5, "-o", tmp_path / "o")
    assert same.exit_code == 2
    assert "overlaps the shots" in same.stderr


def test_an_output_that_is_taken(xpert: Run, source: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    result = xpert("select", source, "--method", "random", "--budget", 5, "-o", taken)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]


def test_methods_are_listed_and_explained(xpert: Run) -> None:
    listed = json.loads(xpert("methods", "--json").stdout)
    assert {"facility", "kcenter", "kmq", "kshot", "mmr", "random"} <= {member["name"] for member in listed["members"]}
    assert all(member["summary"] for member in listed["members"])
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            result = xpert("methods", name, "--kind", kind)
            assert result.exit_code == 0, result.stderr
            assert name in {member["name"] for member in listed["members"] if member["kind"] == kind}
            assert xpert("methods", name).exit_code == 0, "the seam need not be told"
    assert [line for line in xpert("methods").stdout.splitlines() if not line.startswith(" ")] == [
        "selectors", "", "scorers (each is a method too, which takes the best rows)", "", "orderers", "",
        "embedders", "", "executors", "", "routers", "", "aggregators", "", "engines", "", "gates", "", "mergers", "",
        "decoders", "", "remotes",
    ]  # fmt: skip
    assert {
        member["kind"] for member in json.loads(xpert("methods", "--kind", "router", "--json").stdout)["members"]
    } == {"router"}
    assert xpert("methods", "centroid").stdout.startswith("centroid (router)\n")
    shared = xpert("methods", "random").stdout
    assert shared.startswith("random (selector)\n")
    assert shared.endswith("\nalso a router: xpert methods random --kind router\n")
    explained = xpert("methods", "kshot").stdout
    assert "tau = 0.9" in explained
    assert "arXiv:2408.15915" in explained
    for arguments, said in ((("kshto",), "kshot"), (("centriod",), "centroid"), (("--kind", "selecter"), "selector")):
        result = xpert("methods", *arguments)
        assert result.exit_code == 2
        assert f"Did you mean {said!r}" in result.stderr


def test_another_base_of_the_same_name_is_another_selection(
    xpert: Run, source: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    command = ("select", source, "--method", "random", "--base", base, "--budget", "5", "-o", tmp_path / "out")
    assert xpert(*command, "--no-report").exit_code == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    again = xpert(*command, "--no-report")
    assert again.exit_code == 2
    assert "other inputs" in again.stderr
