"""How long the registry takes: publishing small experts, then listing and searching 10,000 entries.

    python benchmarks/registry.py -o benchmarks/results/registry.md

The 10,000 records are written straight into the store (without fsync), so that opening it has to index them all.
Wall seconds and CPU seconds; medians where a step is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from xpert.registry.card import BaseModel, ExpertCard
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
        path = registry.folder / "records" / f"{version.name}@1.json"
        path.write_text(json.dumps(Record(version, files).to_dict()))


def timed(act: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """(median wall seconds, median CPU seconds)."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
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
        row("resolve one name", *timed(lambda: large.resolve("acme/first"), 7))
        row("publish one more", *timed(lambda: large.publish(folders[1], "acme/first")))
        command = [sys.executable, "-m", "xpert", "registry", "list", "--json", "--registry", str(large.folder)]
        wall, _ = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 5)
        lines.append(
            f"| `xpert registry list --json` of {options.entries:,}, process start included | {wall * 1000:,.1f} ms | |"
        )

    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    title = (
        f"{os.cpu_count()} cores ({load}), {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )
    text = "\n".join(["# Registry", "", f"`python benchmarks/registry.py` on {title}.", "", *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
