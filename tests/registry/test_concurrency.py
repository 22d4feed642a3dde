"""Several processes at once, and processes killed at any moment. None of them needs torch, so they start fast."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from xpert.registry.store import Registry

WRITER = """
import sys
from pathlib import Path
from xpert.registry.store import Registry
registry, folders, names = Registry(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), sys.argv[3].split(",")
for number, folder in enumerate(folders):
    version = registry.publish(folder, names[number % len(names)])
    print(version.ref, version.digest, flush=True)
    if "gc" in sys.argv[4:]:
        registry.gc()
    if "pull" in sys.argv[4:]:
        registry.pull(version.ref)
"""


def _start(registry: Registry, folders: Path, names: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(registry.folder), str(folders), names, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_publishers_at_once_lose_nothing(registry: Registry, expert: Callable[..., Path], tmp_path: Path) -> None:
    for writer in range(4):
        for number in range(15):
            expert(f"{writer}/{number:02}", seed=100 * writer + number)
    writers = [
        _start(registry, tmp_path / "experts" / str(writer), "acme/one,acme/two,acme/three", "gc" if writer < 1 else "")
        for writer in range(4)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in writers]
    assert [process.returncode for process in writers] == [0] * 4
    published = dict(pair for words in said for pair in zip(words[::2], words[1::2], strict=True))
    assert len(published) == 60 and len(set(published.values())) == 60
    entries = registry.list()
    assert {entry.latest.name: entry.versions for entry in entries} == {
        name: tuple(range(1, 21)) for name in ("acme/one", "acme/two", "acme/three")
    }
    assert {ref: registry.resolve(ref).digest for ref in published} == published
    assert registry.verify() == []


def test_kills_leave_a_sound_registry(registry: Registry, expert: Callable[..., Path], tmp_path: Path) -> None:
    for number in range(60):
        expert(f"{number:02}", seed=number)
    chance = random.Random(5)
    kills = 0
    for round_ in range(20):
        names = {f"acme/{letter}{round_}" for letter in "abc"}
        process = _start(registry, tmp_path / "experts", ",".join(sorted(names)), "gc", "pull")
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work; an earlier kill would hit the imports
        time.sleep(chance.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=60)[0]
        kills += process.returncode == -signal.SIGKILL
        whole = (first + rest).rpartition("\n")[0]
        said = {line.split()[0] for line in whole.splitlines()}
        assert registry.verify() == []
        held = set()
        for entry in registry.list():
            assert entry.versions == tuple(range(1, len(entry.versions) + 1))
            held |= {f"{entry.latest.name}@{number}" for number in entry.versions}
        assert said and said <= held
        for ref in held:
            registry.pull(ref)
        for name in {ref.partition("@")[0] for ref in held}:  # so that the next one has blobs to write and to sweep
            registry.remove(name)
    assert kills >= 15
    registry.gc()
    left = [path for part in ("drafts", "blobs") for path in (registry.folder / part).rglob("*") if path.is_file()]
    marks = list((registry.folder / "records").rglob("*.json"))
    assert len(left) == len(marks) and all("documents" in path.parts for path in left)  # that versions were removed
    assert registry.verify() == []
