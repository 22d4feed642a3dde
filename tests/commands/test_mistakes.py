"""What a user meets who gives the command line something wrong, fills the disk, or presses Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert import plugins, pool_build, storage
from xpert.errors import STOPPED

Run = Callable[..., Result]

# command line -> a part of the one line; {pool} {shots} {none} {b17} {latin1} {bare} {base} stand for paths.
MISTAKES = {
    "selct": "Did you mean select?",
    "pool biuld": "Did you mean 'build'?",
    "pool build {d}/nope.jsonl -o {d}/o": "nope.jsonl: no such file",
    "pool build {none} -o {d}/o": "none.jsonl: the file is empty",
    "pool build {b17} -o {d}/o": "b17.jsonl: line 17 is not valid JSON",
    "pool build {latin1} -o {d}/o": "latin1.jsonl: line 2 is not UTF-8",
    "pool build {bare} -o {d}/o": "bare.jsonl: none of its 1 rows can be used",
    "pool build {pool} -o {d}/full": "full: the output exists already",
    "pool build {pool} -o {pool}/under": "under: a part of the path is a file",
    "select {pool} --shots {shots} -o {d}/o": "Missing option '--budget'",
    "select {pool} --shots {shots} -o {d}/o --budget 1000": "the budget is 1,000 rows, but the pool holds 40",
    "select {pool} --shots {shots} -o {d}/o --budget 0": "selects nothing",
    "select {pool} --shots {shots} -o {d}/o --budget -5": "budget '-5' is negative",
    "select {pool} --shots {shots} -o {d}/o --budget -5%": "budget '-5%' is negative",
    "select {pool} --shots {shots} -o {d}/o --budget 101%": "more than the whole pool",
    "select {pool} --shots {shots} -o {pool}/under --budget 5": "under: a part of the path is a file",
    "select {pool} --shots {pool} -o {d}/o --budget 5": "every row of the pool overlaps the shots",
    "select {pool} --shots {bare} -o {d}/o --budget 5 --method less": "less' reads the shots' answers, and 1 of 1",
    "select {pool} --shots {b17} -o {d}/o --budget 5": "b17.jsonl: line 17 is not valid JSON",
    "select {pool} --budget 5 -o {d}/o": "needs shots",
    "select {pool} --shots {shots} -o {d}/o --budget 5 --method kshto": "Did you mean 'kshot'?",
    "select {pool} --shots {shots} -o {d}/o --budget 5 -p lamda=1": "unknown parameter 'lamda'",
    "select {pool} --shots {shots} -o {d}/o --budget 5 --embedder lsaa": "Did you mean 'lsa'?",
    "select {pool} --shots {shots} -o {d}/o --budget 5 --devise cpu": "No such option '--devise'",
    "select {pool} --shots {shots} -o {d}/o --budget 5 --config {config}": "config.yaml: unknown option 'bugdet'",
    "train {pool} --base {d}/nope -o {d}/o": "nope: no such model folder",
    "train {pool} --base {weightless} -o {d}/o": "weightless: the model folder has no weights",
    "mix --experts a/b --router centriod -o {d}/o": "centr",
    "mix --experts {d}/full -o {d}/o": "it has no expert.json",
    "profile {d}/nope --suite {pool}": "nope: no such expert folder. Check the path, or take one out of a registry",
    "profile {d}/full --suite {pool}": "it has no expert.json. `xpert train` writes one",
    "eval {d}/nope --suite {pool}": "nope: no such mixture or expert",
    "run {d}/nope.json --prompts {pool} -o {d}/o": "nope.json: no such mixture or expert",
    "run {d}/nope.json --prompts {pool} -o {d}/full": "is a folder; the answers are a file",
    "route {d}/nope.json --prompts {pool}": "nope.json: no such mixture or expert",
    "registry publish {d}/nope --name a/b": "nope: no such expert folder",
}


@pytest.fixture
def places(tmp_path: Path, write_jsonl: Callable[..., Path], columns: Callable[..., Any]) -> dict[str, Path]:
    """Files and folders of a user who errs."""
    good = '{"question": "a?", "answer": "b"}\n'
    files = {
        "none": b"",
        "b17": (good * 16 + '{"question": \n' + good).encode(),
        "latin1": (good + '{"question": "café"}\n').encode("latin-1"),
        "bare": b'{"question": "a?"}\n',
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "config.yaml").write_text("bugdet: 5\n")
    for folder, file in (("full", "file"), ("weightless", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    rows = columns(60)
    found = {name: tmp_path / f"{name}.jsonl" for name in files}
    found |= {"pool": write_jsonl("pool.jsonl", rows[:40]), "shots": write_jsonl("shots.jsonl", rows[40::5])}
    return found | {"d": tmp_path, "config": tmp_path / "config.yaml", "weightless": tmp_path / "weightless"}


def lines(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("xpert:")]


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(command: str, xpert: Run, places: dict[str, Path]) -> None:
    before = sorted(places["d"].rglob("*"))
    result = xpert(*(word.format(**places) for word in command.split()), *(["--quiet"] if " " in command[7:] else []))
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert len(lines(result)) == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert MISTAKES[command] in result.stderr
    assert result.stdout == ""
    assert sorted(places["d"].rglob("*")) == before, "something was left behind"


def test_a_line_names_the_program_once(xpert: Run) -> None:
    for command, said in (
        (("registry", "list", "--registri", "x"), "xpert: registry list: No such option '--registri'. "),
        (("selct",), "xpert: No such command 'selct'. "),
    ):
        assert xpert(*command).stderr.startswith(said)


def test_no_command_prints_the_help(xpert: Run) -> None:
    for command in ((), ("pool",)):
        result = xpert(*command)
        assert (result.exit_code, len(lines(result))) == (2, 1)
        assert "Commands:" in result.stdout


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["a number", "torch's words", "safetensors' words"],
)
def test_a_full_disk_is_one_line_and_status_3(
    error: Exception, xpert: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pool_build, "write_manifest", write)
    before = sorted(places["d"].rglob("*"))
    result = xpert("pool", "build", places["pool"], "-o", places["d"] / "o", "--quiet")
    assert result.exit_code == 3, (result.exception, result.stderr)
    assert result.stderr == f"xpert: {places['d'] / 'o'}: the disk is full. Free some space and run it again\n"
    assert sorted(places["d"].rglob("*")) == before


def test_disk_errors_name_the_final_path_and_let_defects_pass() -> None:
    draft = Path("a") / f".name{storage._DRAFT_MARK}1-2" / "rows"
    with pytest.raises(storage.Unavailable, match=r"disk is full") as full, storage.disk_errors(draft):
        raise OSError(errno.ENOSPC, "full")
    assert full.value.where == str(Path("a/name/rows"))
    with pytest.raises(ZeroDivisionError), storage.disk_errors(draft):
        raise ZeroDivisionError


def test_what_may_not_be_read_is_one_line_and_status_2(
    xpert: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = places["d"] / "sealed" / "registry.json"

    def stat(path: Path, **_: Any) -> os.stat_result:
        if sealed.parent in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.stat(path)

    monkeypatch.setattr(Path, "stat", stat)
    result = xpert("registry", "list", "--registry", sealed.parent)
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert result.stderr == f"xpert: {sealed}: permission denied. Check who may read and write there\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "xpert", "methods"], stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 3
    assert ended.stderr == b"xpert: the output: the disk is full. Free some space and run it again\n"


def test_an_interrupt_that_a_library_turns_into_its_own_error(xpert: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(kind: str) -> list[str]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("multiarray failed to import") from None
        return []

    monkeypatch.setattr(plugins, "names", names)
    result = xpert("methods")
    assert (result.exit_code, result.stderr) == (130, f"xpert: {STOPPED}\n")


@pytest.mark.parametrize("after", [0.15, 0.4, 0.8, 1.4])
def test_ctrl_c_at_any_moment(after: float, places: dict[str, Path]) -> None:
    """Status 130 and one line, or the pool is there and whole; never a draft, never a traceback."""
    out = places["d"] / "sel"
    # The entry's own imports and all later ones; before them Python itself answers.
    start = "from xpert.__main__ import main; print('up', flush=True); main()"
    words = ["select", str(places["pool"]), "--shots", str(places["shots"]), "--budget", "5", "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    if process.returncode == 130:
        assert [line for line in said.splitlines() if line.startswith("xpert:")] == [f"xpert: {STOPPED}"]
        assert not out.exists()
    else:
        assert process.returncode in (0, -signal.SIGINT), said
        assert (out / "manifest.json").is_file()
    assert not list(places["d"].glob(".*"))


def test_a_report_of_an_answer_with_a_nul_is_still_text(tmp_path: Path) -> None:
    """The registry takes text files alone; a poor expert's answers must not keep it from being published."""
    from xpert.report.page import write_page

    write_page(tmp_path / "page.html", "shell.html.jinja", title="a\0b", lead="")
    page = (tmp_path / "page.html").read_text()
    assert "a\ufffdb" in page and "\0" not in page
