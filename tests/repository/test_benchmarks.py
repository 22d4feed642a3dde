"""`make bench` knows every benchmark, and runs one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_make_bench_knows_every_benchmark() -> None:
    asked = subprocess.run([sys.executable, "-m", "benchmarks", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 2
    known = asked.stderr.strip().rpartition("known: ")[2].split(", ")
    assert sorted(known) == sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "__main__")


def test_one_benchmark_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks", "routing"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| mean |" in run.stdout
