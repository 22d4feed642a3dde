"""What is dropped, what a pool folder is, and that it appears whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.data import (
    Pool,
    PoolOptions,
    build_pool,
    open_pool,
    overlapping_rows,
    pool_from_rows,
    read_rows,
    read_shots,
    read_suite,
)
from xpert.errors import BadInput, Unavailable
from xpert.pool import RowsWriter
from xpert.pool_build import exact_key
from xpert.records import Message, Row, Shots
from xpert.row_forms import RowParser, Unfit

Columns = list[dict[str, Any]]
PLAIN = PoolOptions(duplicates=False, near_duplicates=False)
SENTENCE = (
    "the committee met on the old bridge near the mill and spoke about grain prices until the rain came down hard"
)


def rejected(pool: Path) -> Columns:
    return [json.loads(line) for line in (pool / "rejected.jsonl").read_text().splitlines()]


texts = st.text(alphabet=st.sampled_from("ab3 \n+é世"), max_size=12)
records = st.lists(
    st.fixed_dictionaries(
        {"question": texts | st.none() | st.integers(0, 9), "answer": texts | st.booleans()},
        optional={"id": st.sampled_from(["x", "y", "", "z"]), "skill": st.sampled_from(["s", "t"])},
    ),
    min_size=1,
    max_size=25,
)


def slow_pool(rows: Columns, name: str) -> list[tuple[str, str, str | None]]:
    """Row by row, in memory: what a build without the search for near duplicates keeps."""
    parser, kept, seen = RowParser(), [], set()
    for row in rows:
        try:
            parsed = parser.parse(row)
        except Unfit:
            continue
        key = tuple(" ".join(text.split()) for text in (parsed.prompt, parsed.response))
        if key not in seen:
            seen.add(key)
            kept.append((parsed.prompt, parsed.response, parser.skill_of(row)))
    return kept


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records, st.integers(1, 400))
def test_streaming_equals_the_slow_version_in_any_block(
    tmp_path_factory: pytest.TempPathFactory, rows: Columns, block: int
) -> None:
    folder = tmp_path_factory.mktemp("build")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = slow_pool(rows, path.name)
    options = PoolOptions(near_duplicates=False)
    if not expected:
        with pytest.raises(BadInput, match="can be used"):
            build_pool([path], folder / "pool", options)
        return
    pool = build_pool([path], folder / "pool", options, block_bytes=block)
    assert list(zip(pool.prompts(), pool.responses(), pool.skills(), strict=True)) == expected
    assert len(set(pool.ids())) == len(pool)
    assert len(pool) + len(rejected(folder / "pool")) == len(rows)
    whole = build_pool([path], folder / "whole", options)
    assert whole.fingerprint == pool.fingerprint == pool_from_rows(list(pool)).fingerprint
    assert list(whole.ids()) == list(pool.ids())


@given(texts, texts)
def test_the_exact_key_ignores_white_space_alone(one: str, two: str) -> None:
    same = one.split() == two.split()
    assert (exact_key(one, "answer") == exact_key(two, "answer")) == same
    assert (exact_key("prompt", one) == exact_key("prompt", two)) == same


def test_deduplication_is_idempotent(tmp_path: Path, columns: Callable[..., Columns]) -> None:
    rows = columns(60) + columns(30)
    rows += [{**row, "id": f"n{row['id']}", "input": f"{row['input']} {SENTENCE}"} for row in columns(5)]
    rows += [{**row, "id": f"m{row['id']}", "input": f"{row['input']} {SENTENCE}."} for row in columns(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = build_pool([path], tmp_path / "once")
    assert len(pool) == 65
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(pool.table["row"].to_pylist()))
    twice = build_pool([again], tmp_path / "twice")
    assert twice.fingerprint == pool.fingerprint
    assert rejected(tmp_path / "twice") == []


def test_every_dropped_row_stands_in_rejected_with_its_reason(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [
        {"question": f"Tell: {SENTENCE}", "answer": "yes"},
        {"question": f"Tell:  {SENTENCE}\n", "answer": "yes"},
        {"question": f"Tell, {SENTENCE}", "answer": "Yes."},
        {"question": "What?", "answer": " "},
        {"question": "", "answer": "so"},
        {"question": "What?", "answer": ["so"]},
        {"other": 1},
        [1, 2],
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    build_pool([write_jsonl("r.jsonl", rows)], tmp_path / "pool")
    found = {entry["line"]: entry for entry in rejected(tmp_path / "pool")}
    assert {line: entry["reason"] for line, entry in found.items()} == {
        2: "exact duplicate",
        3: "near duplicate",
        4: "has no answer",
        5: "has no prompt",
        6: "answer is a list, not a text",
        7: "has no known form: its columns are other",
        8: "is a list, not an object with columns",
        9: "its last turn is the user's, so it has no answer",
    }
    assert found[2]["of"] == found[3]["of"] == "r.jsonl:1"
    assert [found[line]["row"] for line in range(2, 10)] == rows[1:]
    manifest = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    assert manifest["figures"]["rejected"] == {"unusable": 6, "exact duplicate": 1, "near duplicate": 1}


def test_ids_come_from_the_source_and_are_unique(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"id": label, "question": f"q{n}", "answer": "a"} for n, label in enumerate(["x", "x", 7, None, "x"])]
    pool = build_pool([write_jsonl("r.jsonl", rows)], tmp_path / "pool")
    assert list(pool.ids()) == ["x", "x~2", "7", "r.jsonl:4", "x~5"]


def test_several_sources_make_one_pool(tmp_path: Path, columns: Callable[..., Columns]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in columns(20, seed=seed)))
    pool = build_pool([tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"], tmp_path / "pool")
    assert len(pool) == len(set(pool.ids())) == 40


def test_a_pool_loads_in_datasets(
    tmp_path: Path, write_jsonl: Callable[..., Path], columns: Callable[..., Columns]
) -> None:
    import datasets

    pool = build_pool([write_jsonl("r.jsonl", columns(30))], tmp_path / "pool")
    loaded = datasets.load_from_disk(str(tmp_path / "pool" / "rows"))
    assert loaded["prompt"][:] == list(pool.prompts())
    assert loaded.column_names == pool.table.column_names


def test_a_pool_is_a_sequence_of_rows(rows: list[Row]) -> None:
    pool = pool_from_rows(rows)
    assert list(pool) == rows
    assert pool.rows([5, 3]) == [rows[5], rows[3]]
    assert pool.prompts()[2:5] == [row.prompt for row in rows[2:5]]
    assert pool.responses()[-1] == rows[-1].response
    with pytest.raises(IndexError):
        pool.ids()[len(rows)]
    assert [row.id for row in pool.without([0, 2])][:2] == [rows[1].id, rows[3].id]
    assert pool.without([]) is pool


def test_a_source_is_built_once_into_the_cache(
    write_jsonl: Callable[..., Path], columns: Callable[..., Columns], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("r.jsonl", columns(20))
    first = open_pool(path)
    monkeypatch.setattr("xpert.data.build_pool", lambda *a, **k: pytest.fail("built again"))
    assert open_pool(path).path == first.path
    assert open_pool(str(first.path)).fingerprint == first.fingerprint
    monkeypatch.undo()
    assert open_pool(path, options=PLAIN).path != first.path
    with pytest.raises(BadInput, match="built already"):
        open_pool(first.path or "", options=PLAIN)
    with pytest.raises(BadInput, match="is a pool already"):
        read_rows(first.path or "")


def test_shots_and_their_near_copies_leave_the_pool(write_jsonl: Callable[..., Path]) -> None:
    shot = {"question": f"Why did {SENTENCE}?", "answer": "Because."}
    others = [{"question": f"What is {n} and {n + 1}?", "answer": str(n)} for n in range(30)]
    copy = {"question": f"I ask you, why did {SENTENCE}", "answer": "No idea."}
    shots = read_shots(write_jsonl("shots.jsonl", [shot]))
    pool = open_pool(write_jsonl("pool.jsonl", [*others, {**shot, "question": shot["question"].upper()}, copy]))
    numbers, reasons = overlapping_rows(pool, shots)
    assert numbers.tolist() == [30, 31]
    assert reasons[0] == "same prompt as a row of the shots"
    assert reasons[1].startswith("shares eight words with a row of the shots: ")
    rest = open_pool(pool.path or "", shots=shots)
    assert len(rest) == 30 and rest.fingerprint == pool.without([30, 31]).fingerprint != pool.fingerprint


def test_shots_that_are_the_whole_pool(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl("rows.jsonl", [{"question": "a?", "answer": "b"}])
    shots = read_shots(path)
    with pytest.raises(BadInput, match="all 1 rows overlap the shots"):
        open_pool(path, shots=shots)
    with pytest.raises(BadInput, match="no row is left of 1"):
        build_pool([path], tmp_path / "pool", shots=shots)
    assert not (tmp_path / "pool").exists()


def test_avoided_rows_are_dropped_but_not_for_boilerplate(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    told = "Read the question with great care and then answer it in one single word only please."
    rows = [{"instruction": told, "input": f"item{n} stands here", "output": f"w{n}"} for n in range(60)]
    rows += [{"instruction": "Do it.", "input": SENTENCE, "output": "x"}]
    avoid = write_jsonl(
        "test.jsonl",
        [
            {"instruction": told, "input": "Item7 stands here.", "answers": ["w7"]},
            {"instruction": told, "input": SENTENCE, "answers": ["x"]},
        ],
    )
    pool = build_pool([write_jsonl("r.jsonl", rows)], tmp_path / "pool", avoid=[avoid])
    found = rejected(tmp_path / "pool")
    assert [(entry["line"], entry["of"]) for entry in found] == [(8, "test.jsonl:1"), (61, "test.jsonl:2")]
    assert len(pool) == 59


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_build_that_stops_leaves_nothing(
    error: type[BaseException], tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise error

    path = write_jsonl("r.jsonl", [{"question": "a?", "answer": "b"}])
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(RowsWriter, "close", stop)
    with pytest.raises(error):
        build_pool([path], tmp_path / "out" / "pool")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_jsonl("r.jsonl", [{"question": "a?", "answer": "b"}])
    monkeypatch.setattr("xpert.pool.ContentHash.update", full)
    with pytest.raises(Unavailable, match="the disk is full"):
        build_pool([path], tmp_path / "out" / "pool")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_pool_is_named(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    build_pool([write_jsonl("r.jsonl", [{"question": "a?", "answer": "b"}])], tmp_path / "pool")
    file = tmp_path / "pool" / "rows" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="Build the pool again"):
        Pool.open(tmp_path / "pool")


def test_a_suite_has_answers_metrics_and_skills(write_jsonl: Callable[..., Path]) -> None:
    rows: Columns = [
        {"question": "a?", "answers": ["b", "c"], "metric": "f1", "skill": "s"},
        {"question": "a?", "answers": "b"},
        {"question": "a?", "answer": "b", "choices": ["b", "c"], "metric": "choice"},
    ]
    suite = read_suite(write_jsonl("held.out.jsonl", rows))
    assert suite.name == "held.out"
    assert [(i.answers, i.metric, i.skill, i.choices) for i in suite] == [
        (("b", "c"), "f1", "s", None),
        (("b",), "exact", "all", None),
        (("b",), "choice", "all", ("b", "c")),
    ]
    assert [item.row.response for item in suite] == ["b", "b", "b"]
    rows[0]["answers"] = ["b"]
    assert read_suite(write_jsonl("other.jsonl", rows)).fingerprint != suite.fingerprint


def test_shots_need_an_answer_in_every_row(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("s.jsonl", [{"question": "a?", "answer": "b"}, {"question": "a?", "answer": ""}])
    with pytest.raises(BadInput, match="line 2 has no answer"):
        read_shots(path)


def test_rows_in_memory_are_those_of_the_pool(
    write_jsonl: Callable[..., Path], columns: Callable[..., Columns]
) -> None:
    path = write_jsonl("r.jsonl", columns(30))
    assert list(open_pool(path)) == read_rows(path)


def test_shots_may_hold_turns() -> None:
    turns = (Message("system", "be brief"), Message("user", "why is the sky blue over the sea?"))
    row = Row("a", turns, "light")
    assert overlapping_rows(pool_from_rows([row]), Shots((row,)))[0].tolist() == [0]
