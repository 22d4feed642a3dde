"""A whole pool from its file to a selection: built, embedded with lsa, and selected from, with nothing cached.

    OMP_NUM_THREADS=1 python benchmarks/whole_pool.py --pool POOL [--method facility] [--budget 1000]

Each step runs in a process of its own after the ones before it; prints wall and CPU seconds and the greatest memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--method", default="facility")
    parser.add_argument("--budget", default="1000")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool, out = Path(folder) / "pool", Path(folder) / "selection"
        os.environ["XPERT_CACHE"] = str(Path(folder) / "cache")
        select = ["select", pool, "--method", arguments.method, "--budget", arguments.budget]
        steps = {
            "pool build": ["pool", "build", arguments.pool, "-o", pool],
            f"embed (lsa), select by {arguments.method}": [*select, "-o", out, "--no-report"],
            "the same with clusters and report, embeddings cached": [*select, "-o", f"{out}-report"],
        }
        print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}\n")
        print("| step | wall s | CPU s | peak memory, MB |\n|---|---|---|---|")
        totals = [0.0, 0.0, 0.0]
        for number, (name, command) in enumerate(steps.items()):
            figures = measure([sys.executable, "-m", "xpert", *map(str, command), "--quiet"])
            if number < 2:
                totals = [totals[0] + figures[0], totals[1] + figures[1], max(totals[2], figures[2])]
            print(f"| {name} | {figures[0]:.1f} | {figures[1]:.1f} | {figures[2]:.0f} |", flush=True)
        print(f"| **built, embedded, selected** | {totals[0]:.1f} | {totals[1]:.1f} | {totals[2]:.0f} |")


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak resident megabytes of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
