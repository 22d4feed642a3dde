"""`xpert pool build` and `xpert pool inspect`: results, and what the user is told when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]
GOOD = '{"question": "a?", "answer": "b"}\n'


def test_build_prints_what_was_kept_and_dropped(xpert: Run, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl("r.jsonl", [{"question": "a?", "answer": "b"}] * 3 + [{"question": "a?", "answer": ""}])
    result = xpert("pool", "build", path, "-o", tmp_path / "p", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "read 4 rows, kept 1" in result.stdout
    assert "2  exact duplicate" in result.stdout
    value = json.loads(xpert("pool", "build", path, "-o", tmp_path / "q", "--json", "--no-duplicates").stdout)
    assert (value["read"], value["rows"], value["rejected"]) == (4, 3, {"unusable": 1})
    assert value["forms"] == {"question": 3}


def test_inspect_a_source_and_its_pool(
    xpert: Run, write_jsonl: Callable[..., Path], columns: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_jsonl("r.jsonl", [*columns(40), {"other": 1}])
    source = json.loads(xpert("pool", "inspect", path, "--json", "--quiet").stdout)
    xpert("pool", "build", path, "-o", tmp_path / "p")
    pool = json.loads(xpert("pool", "inspect", tmp_path / "p", "--json").stdout)
    assert source["rows"] == pool["rows"] == 40
    assert source["skills"] == pool["skills"] and len(pool["skills"]) == 5
    assert source["licences"] == {"MIT": 20, "CC0-1.0": 20}
    assert source["forms"] == {"alpaca": 40}
    assert source["unusable"] == {"has no known form: its columns are other": 1}
    assert source["prompt"] == pool["prompt"] and pool["prompt"]["words"]["50%"] > 5
    assert len(pool["samples"]) == 3
    text = xpert("pool", "inspect", path).stdout
    assert "40 usable rows" in text and "form: alpaca (40)" in text


MISTAKES: list[tuple[str, bytes | None, list[str], str]] = [
    ("gone.jsonl", None, [], "no such file"),
    ("empty.jsonl", b"", [], "the file is empty. It must hold at least one row"),
    ("blank.jsonl", b"\n \n\n", [], "holds no rows"),
    ("rows.txt", GOOD.encode(), [], "unknown kind of file '.txt'. Known: .jsonl"),
    (
        "rows.jsonl",
        GOOD.encode() * 16 + b'{"question": "a?", "answer"\n' + GOOD.encode(),
        [],
        "line 17 is not valid JSON",
    ),
    ("rows.jsonl", GOOD.encode() * 2 + "{'caf\u00e9': 1}".encode("latin-1"), [], "line 3 is not UTF-8 (byte 0xe9)"),
    ("rows.jsonl", GOOD.encode("utf-16"), [], "line 1 is UTF-16"),
    ("rows.csv", "question,answer\na?,caf\u00e9\n".encode("latin-1"), [], "line 2 is not UTF-8"),
    ("rows.json", b'[{"question": "a?"},\n{"question" "b"}]', [], "line 2 is not valid JSON"),
    ("rows.jsonl", b'{"ask": "a", "reply": "b"}\n', [], "columns found: ask, reply. Known forms: messages"),
    ("rows.jsonl", b'{"question": "a?", "answer": ""}\n', [], "each has no answer"),
    ("rows.jsonl", GOOD.encode(), ["--format", "alpacca"], "unknown format 'alpacca'. Did you mean 'alpaca'?"),
    ("rows.jsonl", GOOD.encode(), ["--format", "alpaca"], "has no 'instruction' and 'output'"),
    ("rows.jsonl", GOOD.encode(), ["--map", "promt=question"], "unknown part of --map 'promt'. Did you mean 'prompt'?"),
    ("rows.jsonl", GOOD.encode(), ["--map", "prompt"], "is not PART=COLUMN"),
    ("rows.jsonl", GOOD.encode(), ["--map", "prompt=ask,response=answer"], "has no 'ask' and 'answer'"),
    ("rows.jsonl", GOOD.encode(), ["--near-threshold", "2"], "near-threshold is 2.0; the most is 1"),
    ("rows.jsonl", GOOD.encode(), ["--near-treshold", "0.8"], "--near-threshold"),
    ("rows.jsonl", GOOD.encode(), ["--avoid", "gone.jsonl"], "gone.jsonl: no such file"),
    ("rows.jsonl", GOOD.encode(), ["--shots", "gone.jsonl"], "gone.jsonl: no such file"),
]


@pytest.mark.parametrize(("name", "content", "options", "says"), MISTAKES)
def test_mistakes_are_told_in_one_line(
    name: str, content: bytes | None, options: list[str], says: str, xpert: Run, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = xpert("pool", "build", path, "-o", tmp_path / "pool", "--quiet", *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert options or name in result.stderr
    assert not [entry for entry in tmp_path.iterdir() if entry != path]


def test_a_folder_that_is_no_data_set(xpert: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    result = xpert("pool", "build", tmp_path / "folder", "-o", tmp_path / "pool")
    assert result.exit_code == 2
    assert "neither a pool nor a dataset" in result.stderr


def test_an_output_that_exists_is_kept(xpert: Run, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine.txt").write_text("mine")
    path = write_jsonl("r.jsonl", [{"question": "a?", "answer": "b"}])
    result = xpert("pool", "build", path, "-o", tmp_path / "pool")
    assert result.exit_code == 2
    assert "the output exists already. Choose another -o" in result.stderr
    assert (tmp_path / "pool" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b:c:d:e", "hf:a/b::d"])
def test_a_hub_name_that_is_none(spec: str, xpert: Run) -> None:
    result = xpert("pool", "inspect", spec)
    assert result.exit_code == 2
    assert "hf:owner/name[:config][:split]" in result.stderr


def test_the_hub_offline_is_status_3(xpert: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    result = xpert("pool", "inspect", "hf:owner/surely-not-there", "--quiet")
    assert result.exit_code == 3
    assert "the Hugging Face hub is not reachable" in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "a?", "answers": ["b"], "metric": "exactt"}', "Did you mean 'exact'?"),
        ('{"question": "a?"}', "row 1 has no answers"),
        ('{"question": "a?", "answers": [{"text": "b"}]}', "row 1 has answers that are not texts"),
        (
            '{"question": "a?", "answers": ["x"], "metric": "choice", "choices": ["c", "d"]}',
            "no answer among its choices",
        ),
    ],
)
def test_mistakes_in_a_suite(line: str, says: str, tmp_path: Path) -> None:
    from xpert.data import read_suite
    from xpert.errors import BadInput

    path = tmp_path / "suite.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadInput) as caught:
        read_suite(path)
    assert says in str(caught.value) and "suite.jsonl" in str(caught.value)
