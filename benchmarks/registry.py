"""How long the registry takes: publishing small experts, then listing and searching 10,000 entries.

    python benchmarks/registry.py -o benchmarks/results/registry.md

The 10,000 records are written straight into the store (without fsync), so that opening it has to index them all.
Wall seconds and CPU seconds; medians where a step is repeated. Search by meaning uses vectors of 384 random numbers, so
that what is timed is the index and not the embedder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from xpert.registry import reading
from xpert.registry.card import BaseModel, ExpertCard
from xpert.registry.skills.taxonomy import Taxonomy
from xpert.registry.store import Registry
from xpert.registry.versions import Record, StoredFile, Version, content_digest

WORDS = ("french", "german", "poetry", "sums", "logic", "chess", "law", "medicine", "code", "physics", "cooking", "go")


def expert(folder: Path, seed: int, kilobytes: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weights = {"layer.lora_A.weight": rng.normal(size=(kilobytes, 256)).astype(np.float32)}
    (folder / "adapter_model.safetensors").write_bytes(save(weights))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ExpertCard(base=BaseModel("base", "b" * 64), adapter={"r": 8}, skills=("sums",)).write(folder)
    return folder


def fill(registry: Registry, count: int) -> None:
    """Writes `count` version records of made-up experts."""
    chance = random.Random(0)
    for number in range(count):
        owner, skills = f"owner{number % 200}", tuple(chance.sample(WORDS, 3))
        (registry.folder / "records" / owner).mkdir(parents=True, exist_ok=True)
        files = tuple(StoredFile(f"{name}.json", 100, f"{number:064x}") for name in ("expert", "adapter_config"))
        version = Version(
            *(f"{owner}/{skills[0]}-{number}", 1, "expert", content_digest(files), "2026-01-01T00:00:00Z", 200),
            *(
                "base",
                "b" * 64,
                f"An expert for {skills[1]} and {skills[2]}",
                skills,
                {s: chance.random() for s in skills},
            ),
        )
        data = Record(version, files).to_bytes()
        (registry.folder / "records" / f"{version.name}@1.json").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        copy = registry.records.copies.path(sha256)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)


class Noise:
    """Stands in for an embedder: a vector per text, at once."""

    identity = "noise"

    def embed(self, texts: Sequence[str], progress: object = None) -> NDArray[np.float32]:
        rows = np.random.default_rng(len(texts)).normal(size=(len(texts), 384)).astype(np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def timed(act: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """(median wall seconds, median CPU seconds)."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def of_process(command: Sequence[str], repeats: int = 7) -> tuple[float, float]:
    """(median wall seconds, median CPU seconds) of a process."""
    walls, cpus = [], []
    for _ in range(repeats):
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - wall)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--experts", type=int, default=500)
    parser.add_argument("--entries", type=int, default=10_000)
    options = parser.parse_args()
    lines = ["| step | wall | CPU |", "|---|---|---|"]

    def row(step: str, wall: float, cpu: float) -> None:
        lines.append(f"| {step} | {wall * 1000:,.1f} ms | {cpu * 1000:,.1f} ms |")

    with tempfile.TemporaryDirectory() as scratch:
        folders = [expert(Path(scratch) / "experts" / str(n), n, 64) for n in range(options.experts)]
        registry = Registry(Path(scratch) / "small")
        wall, cpu = timed(lambda: [registry.publish(folder, f"acme/e{n}") for n, folder in enumerate(folders)])
        row(
            f"publish one expert of 64 kB, fsynced (mean of {options.experts})", wall / len(folders), cpu / len(folders)
        )
        row(f"verify {options.experts} experts", *timed(registry.verify))

        large = Registry(Path(scratch) / "large")
        large.publish(folders[0], "acme/first")
        fill(large, options.entries)
        row(f"index {options.entries:,} records anew", *timed(large.list))
        row(f"list {options.entries:,} entries", *timed(large.list, 7))
        row(f"search `french` among {options.entries:,}", *timed(lambda: large.search("french"), 7))
        row(f"search `french chess law` among {options.entries:,}", *timed(lambda: large.search("french chess law"), 7))
        taxonomy = Taxonomy.builtin()
        row("the same with the taxonomy", *timed(lambda: large.search("french", taxonomy=taxonomy), 7))
        with mock.patch.object(reading, "open_fixed_embedder", lambda spec, device: Noise()):
            row("keep 10,000 vectors", *timed(lambda: large.search("french", embedder="noise")))
            row("search `french` by words and by meaning", *timed(lambda: large.search("french", embedder="noise"), 7))
        row("rebuild all names and the index from the blobs", *timed(large.rebuild))
        row("resolve one name", *timed(lambda: large.resolve("acme/first"), 7))
        row("publish one more", *timed(lambda: large.publish(folders[1], "acme/first")))
        for words in (["list", "--json"], ["list"], ["search", "french"]):
            command = [sys.executable, "-m", "xpert", "registry", *words, "--registry", str(large.folder)]
            wall, cpu = of_process(command)
            row(f"`xpert registry {' '.join(words)}`, process start included", wall, cpu)

    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    title = (
        f"{os.cpu_count()} cores ({load}), {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )
    made_by = f"python benchmarks/registry.py --experts {options.experts}"
    text = "\n".join(["# Registry", "", f"`{made_by}` on {title}.", "", *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
