"""Every source gives the same rows; every row form is recognised."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xpert.data import PoolOptions, build_pool, open_pool, pool_from_rows, read_prompts, read_rows
from xpert.errors import BadInput, Corrupt, XpertError
from xpert.json_readers import JsonArray, JsonLines
from xpert.readers import open_source
from xpert.records import Message

Columns = list[dict[str, Any]]


def _write(kind: str, folder: Path, rows: Columns) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == ".jsonl.zst":
        import zstandard

        path.write_bytes(zstandard.compress(lines))
    elif kind == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


KINDS = [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet", "-dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows(kind: str, tmp_path: Path, columns: Callable[..., Columns]) -> None:
    rows = columns(50)
    rows[3]["input"] = 'two\nlines, a "quote" and ünïcode ✓'
    read = read_rows(_write(kind, tmp_path, rows))
    assert [dict(row.columns) for row in read] == rows
    assert [row.prompt for row in read] == [f"{row['instruction']}\n\n{row['input']}" for row in rows]
    assert [row.skill for row in read] == [row["skill"] for row in rows]


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_pool_of_any_source_has_the_same_fingerprint(
    kind: str, tmp_path: Path, columns: Callable[..., Columns]
) -> None:
    rows = columns(40)
    pool = build_pool([_write(kind, tmp_path, rows)], tmp_path / "pool")
    assert pool.fingerprint == pool_from_rows(list(pool)).fingerprint
    assert pool.fingerprint == build_pool([_write(".jsonl", tmp_path, rows)], tmp_path / "plain").fingerprint
    assert [json.loads(text) for text in pool.table["row"].to_pylist()] == rows


def test_a_json_line_is_kept_as_it_was_written(tmp_path: Path) -> None:
    text = '{"question":  "Why?", "answer": "So.", "weight": 1.50, "note": "\\u00e9"}'
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\ufeff{text}\r\n\n  \n{text.replace('Why', 'How')}")
    pool = build_pool([path], tmp_path / "pool", PoolOptions(near_duplicates=False))
    assert pool.table["row"].to_pylist() == [text, text.replace("Why", "How")]
    assert list(pool.ids()) == ["rows.jsonl:1", "rows.jsonl:4"]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": "d"}\n')
    assert [row.response for row in read_rows(path)] == ["b", "d"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 100_000])
def test_a_json_array_is_read_the_same_in_any_window(chunk: int, tmp_path: Path) -> None:
    rows: Columns = [{"question": f"é{'x' * size}", "answer": "[]}", "n": [1, {"a": -1.5e3}]} for size in range(9)]
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode())
    blocks = list(JsonArray(path, chunk).blocks())
    assert [value for block in blocks for value in block.values] == rows
    starts = [number for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1) if line == "  {"]
    assert [line for block in blocks for line in block.lines] == starts


@pytest.mark.parametrize("size", [1, 5, 33, 1000])
def test_json_lines_are_read_the_same_in_any_block(size: int, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"question": "q" * number, "answer": str(number)} for number in range(1, 30)]
    blocks = list(JsonLines(write_jsonl("rows.jsonl", rows), size).blocks())
    assert [value for block in blocks for value in block.values] == rows
    assert [line for block in blocks for line in block.lines] == list(range(1, 30))


def test_nan_is_read_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?", "answer": "b", "score": NaN}\n')
    assert read_rows(path)[0].columns["score"] is None


FORM_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]}),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                {"role": "assistant", "content": "reply"},
            ]
        },
    ),
    ("conversations", {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]}),
    ("alpaca", {"instruction": "ask", "input": "", "output": "reply"}),
    ("alpaca", {"instruction": "ask", "output": "reply"}),
    ("completion", {"prompt": "ask", "completion": "reply"}),
    (
        "completion",
        {"prompt": [{"role": "user", "content": "ask"}], "completion": [{"role": "assistant", "content": "reply"}]},
    ),
    ("completion", {"prompt": [{"role": "user", "content": "ask"}], "completion": "reply"}),
    ("question", {"question": "ask", "answer": "reply"}),
    ("messages", {"messages": '[{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]'}),
]


@pytest.mark.parametrize(("form", "row"), FORM_ROWS)
def test_every_form_is_recognised_and_can_be_forced(
    form: str, row: dict[str, Any], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl("rows.jsonl", [{**row, "kept": 1}])
    for forced in (None, form):
        read = read_rows(path, form=forced)[0]
        assert read.messages == (Message("user", "ask"),)
        assert read.response == "reply"
        assert read.columns["kept"] == 1


def test_turns_before_the_last_answer_are_the_prompt(write_jsonl: Callable[..., Path]) -> None:
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("observation", "42"), ("gpt", "done")]
    path = write_jsonl("r.jsonl", [{"conversations": [{"from": who, "value": text} for who, text in turns]}])
    row = open_pool(path).row(0)
    assert [turn.role for turn in row.messages] == ["system", "user", "assistant", "tool"]
    assert (row.prompt, row.response) == ("be kind\n\nhi\n\nhello\n\n42", "done")


def test_columns_that_bear_other_names(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("r.jsonl", [{"ask": "q", "reply": 7, "task": "sums", "key": 12}])
    options = PoolOptions(map=("prompt=ask", "response=reply", "skill=task", "id=key"))
    row = open_pool(path, options=options).row(0)
    assert (row.prompt, row.response, row.skill, row.id) == ("q", "7", "sums", "12")


def test_prompts_may_lack_an_answer(write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"prompt": "one"},
        {"instruction": "two", "input": "b"},
        {"question": "three", "answer": None},
        {"messages": [{"role": "user", "content": "four"}]},
    ]
    read = read_prompts(write_jsonl("p.jsonl", rows))
    assert [(row.prompt, row.response) for row in read] == [("one", ""), ("two\n\nb", ""), ("three", ""), ("four", "")]


def test_a_csv_answer_may_be_long_and_a_row_too_wide(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'question,answer\nq1,"{"x" * 200_000}"\nq2,a,b\n"two\nlines",c\n')
    pool = build_pool([path], tmp_path / "pool")
    assert [len(text) for text in pool.responses()] == [200_000, 1]
    assert list(pool.ids()) == ["rows.csv:2", "rows.csv:4"]
    rejected = json.loads((tmp_path / "pool" / "rejected.jsonl").read_text())
    assert (rejected["line"], rejected["reason"]) == (3, "has 3 fields, the header 2")


def test_a_data_set_with_splits_is_named_by_split(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(BadInput, match="several splits: train, test"):
        read_rows(tmp_path / "both")
    assert len(read_rows(tmp_path / "both" / "test")) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"question": "a", "answer": "b"}\n' * 50)[:-20], "cut short"),
        ("a.jsonl.gz", b"plain text", "not a gzip file"),
        ("a.jsonl.zst", b"plain text", "not a sound zstd file"),
        ("a.parquet", b"PAR1 plain text", "not a sound parquet file"),
        ("a.csv", b'question,answer\na,"b', "line 2 is not valid CSV"),
        ("a.csv", b"question,question\na,b\n", "line 1 names the column 'question' twice"),
        ("a.json", b'[{"question": "a"},\n {"question" "b"}]', "line 2 is not valid JSON"),
        ("a.json", b'[{"question": "a"}', "line 1 is not valid JSON (the file ends too early)"),
        ("a.json", b'"text"', "neither a JSON array"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_rows(path)
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_a_zstd_file_that_is_cut_short(tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"question": "a", "answer": "b"}\n' * 2000)[:-5])
    with pytest.raises(Corrupt, match="cut short"):
        read_rows(path)


def test_the_hub_is_not_reached_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **rest: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(XpertError) as caught:
        list(open_source("hf:owner/name").blocks())
    assert caught.value.exit_code == 3


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa

    asked: list[Any] = []

    class Stream:
        def with_format(self, name: str) -> Stream:
            assert name == "arrow"
            return self

        def iter(self, batch_size: int) -> Iterator[Any]:
            yield pa.table({"question": ["a"], "answer": ["b"]})

    def load(*args: Any, **rest: Any) -> Any:
        asked.append((args, rest))
        return Stream()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("hf:owner/name:main:test")[0].response == "b"
    assert asked == [(("owner/name", "main"), {"split": "test", "streaming": True})]
