"""Many processes at once, processes killed at any moment, and flipped bits: nothing published is lost or torn.

`make reliability` runs these at full count (`XPERT_RELIABILITY=full`); the ordinary run at a smaller one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xpert.errors import Corrupt
from xpert.registry.store import Registry

Maker = Callable[..., Path]

FULL = os.environ.get("XPERT_RELIABILITY") == "full"
KILLS = 300 if FULL else 24
PUBLISHERS, EACH = (8, 100) if FULL else (4, 15)
FLIPS = 200 if FULL else 3

PUBLISHER = """
import sys
from pathlib import Path
from xpert.registry.store import Registry
registry, folders, names = Registry(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), sys.argv[3].split(",")
for number, folder in enumerate(folders):
    version = registry.publish(folder, names[number % len(names)])
    print(version.ref, version.digest, flush=True)
    if "gc" in sys.argv[4:] and number % 5 == 0:
        registry.gc()
"""

# What it is about to do it says before, what it has done it says after: a kill may fall anywhere between.
WORKER = """
import random, sys, uuid
from pathlib import Path
from xpert.errors import XpertError
from xpert.registry.store import Registry
registry, folders, out = Registry(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir()), Path(sys.argv[3])
owner, chance, deeds = sys.argv[4], random.Random(int(sys.argv[5])), sys.argv[6].split(",")
own = []
print("ready", flush=True)
sys.stdin.readline()
while True:
    deed = chance.choice(deeds)
    if deed == "publish":
        version = registry.publish(chance.choice(folders), f"{owner}/{chance.choice('abc')}{uuid.uuid4().hex[:2]}")
        own.append(version.ref)
        print("published", version.ref, version.digest, flush=True)
    elif deed == "gc":
        registry.gc()
    elif deed == "rebuild":
        registry.rebuild()
    elif own and deed == "pull":
        registry.pull(chance.choice(own), out / uuid.uuid4().hex)
    elif own and deed == "tag":
        ref = chance.choice(own)
        registry.tag(ref, "stable")
        print("tagged", ref, flush=True)
    elif own and deed == "remove":
        ref = own.pop(chance.randrange(len(own)))
        print("removing", ref, flush=True)
        registry.remove(ref)
        print("removed", ref, flush=True)
"""


def test_publishers_at_once_lose_nothing(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    for writer in range(PUBLISHERS):
        for number in range(EACH):
            expert(f"{writer}/{number:03}", seed=1000 * writer + number)
    names = ("acme/one", "acme/two", "bell/three")
    writers = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PUBLISHER, registry.folder, tmp_path / "experts" / str(writer)),
                *(",".join(names), "gc" if writer < 2 else ""),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer in range(PUBLISHERS)
    ]
    said = [process.communicate(timeout=1200)[0].split() for process in writers]
    assert [process.returncode for process in writers] == [0] * PUBLISHERS
    published = dict(pair for words in said for pair in zip(words[::2], words[1::2], strict=True))
    assert len(published) == len(set(published.values())) == PUBLISHERS * EACH
    entries = registry.list()
    assert [entry.latest.name for entry in entries] == list(names)
    assert all(entry.versions == tuple(range(1, len(entry.versions) + 1)) for entry in entries)
    assert sum(len(entry.versions) for entry in entries) == PUBLISHERS * EACH
    assert {ref: registry.resolve(ref).digest for ref in published} == published
    assert registry.verify() == []
    for ref in random.Random(1).sample(sorted(published), 10):
        registry.pull(ref, tmp_path / "pulled" / ref.replace("/", "-"))


DEEDS = {
    "publish": "publish",
    "pull": "publish,pull,pull,pull,pull",
    "gc": "publish,publish,remove,gc,gc",
    "all": "publish,publish,publish,pull,tag,remove,gc,rebuild",
}


@pytest.mark.parametrize("deeds", DEEDS)
def test_kills_leave_a_sound_registry(registry: Registry, expert: Maker, tmp_path: Path, deeds: str) -> None:
    for number in range(12):
        expert(f"{number:02}", seed=number)
    registry.publish(tmp_path / "experts" / "00", "acme/first")
    chance = random.Random(deeds)
    known: dict[str, str] = {}
    gone: set[str] = set()
    unsure: set[str] = set()
    for round_ in range(KILLS // len(DEEDS)):
        # Two at once, killed one after the other: the second must get on with what the first left behind.
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", WORKER, registry.folder, tmp_path / "experts", tmp_path / "out"),
                    *(f"owner{worker}", str(1000 * round_ + worker), DEEDS[deeds]),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for worker in range(2)
        ]
        for worker in workers:
            assert worker.stdout is not None and worker.stdin is not None
            assert worker.stdout.readline() == "ready\n"
            worker.stdin.write("go\n")
            worker.stdin.flush()
        told = []
        for worker in workers:
            assert worker.stdout is not None and worker.stdin is not None
            # After some words, so that the busiest machine gets somewhere, and then at any moment.
            words = [worker.stdout.readline() for _ in range(chance.randrange(5))]
            time.sleep(chance.random() * 0.05)
            worker.send_signal(signal.SIGKILL)
            # Not `communicate`, which passes over what `readline` has read ahead.
            told.append("".join(words) + worker.stdout.read())
            assert worker.wait(timeout=60) == -signal.SIGKILL, told
            worker.stdin.close()
            worker.stdout.close()
        for text in told:
            for line in text.rpartition("\n")[0].splitlines():
                deed, ref, *rest = line.split()
                if deed == "published":
                    known[ref] = rest[0]
                elif deed == "removing":
                    unsure.add(ref)
                elif deed == "removed":
                    unsure.discard(ref)
                    gone.add(ref)
        # A kill between the record and the word "published" leaves a version that nobody was told of: it must be whole.
        assert registry.verify() == [], f"round {round_}"
        held = {f"{entry.latest.name}@{n}": entry for entry in registry.list() for n in entry.versions}
        assert known.keys() - gone - unsure <= held.keys() and not gone & held.keys()
        assert all(registry.resolve(ref).digest == digest for ref, digest in known.items() if ref in held)
        for ref in chance.sample(sorted(held), min(2, len(held))):
            registry.pull(ref, tmp_path / "out" / f"{round_}-{ref.replace('/', '-')}")
    assert known
    # What was pulled is there whole; drafts of the dead go when the next one comes.
    for folder in (tmp_path / "out").iterdir():
        if not folder.name.startswith("."):
            assert (folder / "expert.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    registry.gc()
    assert list((registry.folder / "drafts").iterdir()) == []
    before = registry.list()
    registry.rebuild()
    assert registry.list() == before and registry.verify() == []


def test_every_flipped_bit_is_found(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    every = [p for part in ("blobs", "records") for p in (registry.folder / part).rglob("*") if p.is_file()]
    assert len(every) == 7  # four files, the card, the record and its copy
    chance = random.Random(3)
    for number, path in enumerate(every):
        good = path.read_bytes()
        path.chmod(0o644)
        for place in (0, len(good) // 2, len(good) - 2, *(chance.randrange(len(good)) for _ in range(FLIPS - 3))):
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(bad))
            assert registry.verify(), f"{path} byte {place}"
            if "documents" not in path.parts:  # a copy is not what is pulled
                with pytest.raises(Corrupt):
                    registry.pull("acme/a", tmp_path / f"out{number}")
                assert not (tmp_path / f"out{number}").exists()
        path.write_bytes(good)
    assert registry.verify() == []
