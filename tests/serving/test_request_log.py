"""The request log: what is written, by whom, how it ends, and what its reader forgives."""

from __future__ import annotations

import gzip
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.experts.gaps.reading import read_requests
from xpert.experts.server import request_log
from xpert.experts.server.request_log import RequestLog, RequestRecord
from xpert.protocols import Candidate, Route
from xpert.records import Message
from xpert.source_files import encode

NOON = 1_764_504_000.0  # 2025-11-30, 12:00 UTC


def a_record(number: int = 0, **given: Any) -> RequestRecord:
    plain: dict[str, Any] = {
        "id": f"chatcmpl-{number}",
        "time": NOON + number,
        "mixture": "three",
        "fingerprint": "f" * 12,
        "model": "three",
        "messages": (Message("user", f"question {number}"),),
    }
    return RequestRecord(**(plain | given))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in files(folder) for line in path.read_text().splitlines()]


texts = st.text(max_size=20)
numbers = st.floats(-1e3, 1e3).map(lambda value: round(value, 6))


@given(
    st.builds(
        RequestRecord,
        id=texts,
        time=st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000),
        mixture=texts,
        fingerprint=texts,
        model=texts,
        messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts)).map(tuple),
        experts=st.lists(st.tuples(texts, numbers)).map(tuple),
        candidates=st.lists(st.builds(Candidate, texts, numbers), max_size=10).map(tuple),
        chance=st.none() | st.floats(0, 1),
        reason=texts,
        routed=st.booleans(),
        fell_back=st.booleans(),
        finished=st.sampled_from(["stop", "length", "cancelled"]),
        prompt_tokens=st.integers(0, 10**6),
        completion_tokens=st.integers(0, 10**6),
        seconds=st.integers(0, 10**7).map(lambda tenths: tenths / 10_000),
        reply=st.none() | texts,
        key=st.none() | texts,
    )
)
def test_a_record_comes_back_as_it_was(record: RequestRecord) -> None:
    assert RequestRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_route_is_taken_with_its_ten_best_candidates() -> None:
    candidates = tuple(Candidate(f"e{i}", 1 - i / 100) for i in range(30))
    route = Route((), candidates, "too far", chance=0.1)
    record = a_record().taking(route)
    assert record.candidates == candidates[:10] and record.score == 1 and record.chance == 0.1
    assert record.fell_back
    assert not a_record(routed=False, model="base").taking(route).fell_back  # base was asked for: nothing fell back
    assert not a_record().taking(Route((("e0", 1.0),), candidates, "near")).fell_back


def test_records_are_written_in_order_for_the_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "log"
    with RequestLog(folder) as log:
        assert all(log.record(a_record(number, reply="secret answer")) for number in range(50))
    assert [line["id"] for line in lines(folder)] == [f"chatcmpl-{number}" for number in range(50)]
    assert all("reply" not in line for line in lines(folder))
    [path] = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert path.name.split("-")[4] == str(os.getpid())


def test_replies_are_kept_only_where_asked_for(tmp_path: Path) -> None:
    with RequestLog(tmp_path / "log", replies=True) as log:
        log.record(a_record(reply="Grün."))
    assert lines(tmp_path / "log")[0]["reply"] == "Grün."


def test_a_day_and_a_size_begin_new_files(tmp_path: Path) -> None:
    size = len(encode(a_record().to_dict())) + 1
    times = iter([*[NOON] * 5, NOON + 86_400, NOON + 2 * 86_400])
    with RequestLog(tmp_path / "log", max_bytes=2 * size, clock=lambda: next(times)) as log:
        for number in range(7):
            log.record(a_record(number))
    found = sorted((path.name[9:19], len(path.read_text().splitlines())) for path in files(tmp_path / "log"))
    first = "2025-11-30"
    assert found == [(first, 1), (first, 2), (first, 2), ("2025-12-01", 1), ("2025-12-02", 1)]
    assert read_requests([tmp_path / "log"]).records == tuple(a_record(number) for number in range(7))


def test_a_full_queue_drops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, go = threading.Event(), threading.Event()
    plain = request_log._Files.write

    def slow(self: Any, line: bytes) -> None:
        started.set()
        assert go.wait(10)
        plain(self, line)

    monkeypatch.setattr(request_log._Files, "write", slow)
    with caplog.at_level(logging.WARNING, "xpert.server"):
        log = RequestLog(tmp_path / "log", queued=3)
        log.record(a_record(0))
        assert started.wait(10)  # the writer holds the first record, and the queue is empty
        taken = [log.record(a_record(number)) for number in range(1, 9)]
        assert taken == [True] * 3 + [False] * 5 and log.dropped == 5
        go.set()
        log.close()
    assert [line["id"] for line in lines(tmp_path / "log")] == [f"chatcmpl-{number}" for number in range(4)]
    assert [message.split(": ")[-1] for message in caplog.messages][:3] == [
        "1 records are lost by now",
        "2 records are lost by now",
        "4 records are lost by now",
    ]
    assert caplog.messages[-1].endswith("lacks 5 records")


def test_long_prompts_fill_the_queue_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    monkeypatch.setattr(request_log, "QUEUED_CHARACTERS", 1000)
    monkeypatch.setattr(request_log._Files, "write", lambda self, line: (started.set(), go.wait(10)))
    log = RequestLog(tmp_path / "log")
    log.record(a_record(0))
    assert started.wait(10)
    long = (Message("user", "x" * 600),)
    assert [log.record(a_record(number, messages=long)) for number in range(1, 5)] == [True, True, False, False]
    go.set()
    log.close()


def test_a_closed_log_takes_nothing(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    log.close()
    log.close()
    assert not log.record(a_record()) and log.dropped == 1
    assert files(tmp_path / "log") == []


def test_a_full_disk_loses_whole_records_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = os.write, [0]

    def failing(descriptor: int, data: Any) -> int:
        calls[0] += 1
        if calls[0] == 2:
            return write(descriptor, bytes(data)[:7])  # a part of the second record, and then
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(request_log.os, "write", failing)
    with RequestLog(tmp_path / "log") as log:
        for number in range(4):
            log.record(a_record(number))
    assert log.dropped == 1
    assert [line["id"] for line in lines(tmp_path / "log")] == ["chatcmpl-0", "chatcmpl-2", "chatcmpl-3"]


def test_two_processes_write_into_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]);"
        "from xpert.experts.server.request_log import RequestLog, RequestRecord;"
        "from xpert.records import Message;"
        "log = RequestLog(sys.argv[1]);"
        "[log.record(RequestRecord(f'{sys.argv[2]}-{i}', 1.0, 'm', 'f', 'm', (Message('user', 'x'),))) "
        "for i in range(200)];"
        "log.close(); print(log.dropped)"
    )
    root = str(Path(request_log.__file__).parents[3])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "log"), name, root], stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    assert [process.communicate()[0].strip() for process in running] == ["0", "0"]
    assert len(files(tmp_path / "log")) == 2
    found = read_requests([tmp_path / "log"])
    assert {record.id for record in found.records} == {f"{name}-{i}" for name in "ab" for i in range(200)}


def test_packed_and_torn_files_and_copies_are_read(tmp_path: Path) -> None:
    def text(*chosen: int) -> bytes:
        return b"".join(json.dumps(a_record(number).to_dict()).encode() + b"\n" for number in chosen)

    (tmp_path / "one.jsonl").write_bytes(text(3, 1) + text(2)[:-40])
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(text(4, 1)))
    (tmp_path / "three.jsonl.zst").write_bytes(zstandard.compress(text(0)))
    (tmp_path / "notes.txt").write_text("no log")
    found = read_requests([tmp_path, tmp_path / "one.jsonl"])
    assert [record.id for record in found.records] == [f"chatcmpl-{number}" for number in (0, 1, 3, 4)]
    assert (found.files, found.torn, found.repeated) == (3, 1, 1)


GOOD = json.dumps(a_record().to_dict())


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (f"{GOOD[:-9]}\n{GOOD}\n", Corrupt, "line 1 is no record of a request"),
        (f'{GOOD}\n{{"id": "x"}}\n', Corrupt, "line 2 is no record of a request"),
        (f"{GOOD}\n[]\n", Corrupt, "line 2 is no record of a request"),
        (GOOD.replace('"time": "', '"time": "x'), Corrupt, "line 1 is no record"),
        (GOOD.replace('"schema": 1', '"schema": 2'), BadInput, "newer xpert (schema 2)"),
        ("", BadInput, "holds no requests"),
        (GOOD[:-5], BadInput, "holds no requests"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: str, error: type[XpertError], message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(error) as raised:
        read_requests([path])
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, NotFound, "no such file or folder"),
        (lambda path: path.mkdir(), NotFound, "holds no request log"),
        (lambda path: path.write_text(GOOD), BadInput, "not a request log by its name"),
    ],
)
def test_places_without_a_log(
    tmp_path: Path, make: Callable[[Path], object], error: type[XpertError], message: str
) -> None:
    make(tmp_path / "place")
    with pytest.raises(error, match=message):
        read_requests([tmp_path / "place"])


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(BadInput, match="the request log is a folder"):
        RequestLog(tmp_path / "log")


def test_a_folder_that_others_may_read_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log").mkdir(mode=0o755)
    with caplog.at_level(logging.WARNING, "xpert.server"):
        RequestLog(tmp_path / "log").close()
    assert "chmod 700" in caplog.text
