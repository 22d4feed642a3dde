"""Building a pool of a million rows (640 MB of JSON lines), beside programs that only read them.

    python benchmarks/pool_build.py [--rows 1000000] [--runs 1] [--out benchmarks/results/pool_build.md]

The rows are made up (seeded): tasks with a shared instruction, Zipf-distributed words, 1 % exact and 1 % near
duplicates. Every contestant runs in a process of its own, in turn; a run's figures are its wall time, the CPU time of
all its threads and its peak resident memory. What each does is not the same: the readers keep nothing, `datasets`
writes Arrow, xpert also checks, normalises, hashes, deduplicates and writes a pool.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READERS = {
    "orjson, streaming loop (reads only)": """
        import orjson, sys
        count = 0
        with open(sys.argv[1], "rb") as stream:
            for line in stream:
                row = orjson.loads(line)
                count += len(row["output"])
    """,
    "datasets.load_dataset('json'), cold": """
        import datasets, sys, tempfile
        with tempfile.TemporaryDirectory(dir=sys.argv[2]) as cache:
            datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    """,
    "xpert pool build --no-near-duplicates --no-duplicates": """
        import sys
        from pathlib import Path
        from xpert.data import PoolOptions, build_pool
        build_pool([sys.argv[1]], Path(sys.argv[2]) / "a", PoolOptions(duplicates=False, near_duplicates=False))
    """,
    "xpert pool build --no-near-duplicates": """
        import sys
        from pathlib import Path
        from xpert.data import PoolOptions, build_pool
        build_pool([sys.argv[1]], Path(sys.argv[2]) / "b", PoolOptions(near_duplicates=False))
    """,
    "xpert pool build": """
        import sys
        from pathlib import Path
        from xpert.data import build_pool
        build_pool([sys.argv[1]], Path(sys.argv[2]) / "c")
    """,
}


def write_rows(path: Path, rows: int) -> None:
    """About 640 bytes a row."""
    r = random.Random(0)
    vocabulary = ["".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(2, 9))) for _ in range(30_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    words = r.choices(vocabulary, weights, k=2_000_000)  # drawn once; rows take stretches of it

    def text(count: int) -> str:
        start = r.randrange(len(words) - count)
        picked = words[start : start + count]
        picked[r.randrange(count)] = str(r.randrange(10_000))
        r.shuffle(picked)
        return " ".join(picked)

    tasks = [(f"task{number}", text(r.randint(6, 30)) + ".") for number in range(300)]
    before: dict[str, str] = {}
    with path.open("w") as stream:
        for number in range(rows):
            chance = r.random()
            if before and chance < 0.01:
                row = {**before, "id": f"r{number}"}
            elif before and chance < 0.02:
                row = {**before, "id": f"r{number}", "input": before["input"] + " please"}
            else:
                task, instruction = r.choice(tasks)
                row = {
                    "id": f"r{number}",
                    "instruction": instruction,
                    "input": text(r.randint(15, 55)),
                    "output": text(r.randint(5, 40)),
                    "skill": task,
                    "licence": "CC0-1.0",
                }
            before = row
            stream.write(json.dumps(row) + "\n")


def run(code: str, path: Path, folder: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MiB of one process."""
    program = "\n".join(line[8:] for line in code.splitlines())
    program += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, float(done.stdout.split()[-1])


def machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.jsonl"
        write_rows(path, options.rows)
        megabytes = path.stat().st_size / 1e6
        lines = [
            f"`python benchmarks/pool_build.py --rows {options.rows} --runs {options.runs}`",
            "",
            f"{options.rows:,} rows, {megabytes:,.0f} MB of JSON lines; {machine()}; medians of {options.runs}.",
            "",
            "| program | wall s | CPU s | CPU / orjson loop | peak MiB |",
            "|---|---|---|---|---|",
        ]
        base = 0.0
        for title, code in READERS.items():
            figures = []
            for number in range(options.runs):
                output = folder / f"out-{number}"
                output.mkdir()
                figures.append(run(code, path, output))
                subprocess.run(["rm", "-rf", str(output)], check=True)
            wall, cpu, peak = (statistics.median(column) for column in zip(*figures, strict=True))
            base = base or cpu
            lines.append(f"| {title} | {wall:.1f} | {cpu:.1f} | {cpu / base:.1f} | {peak:,.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
