"""`make bench`: every benchmark in turn, on data that the installed packages carry.

    python -m benchmarks [NAME ...] [--pool POOL --shots SHOTS --prompts PROMPTS]

The committed tables were made on a larger pool and by the commands that stand in them; here the demo's data serve where
no others are given, so that nothing has to be fetched. One thread; some twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from xpert.experts.demo.chain import base_model
from xpert.experts.demo.sources import write_demo_data

FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks; default: all")
    for name in ("--pool", "--shots", "--prompts"):
        parser.add_argument(name)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(Path(folder), given.pool, given.shots, given.prompts)
        unknown = set(given.names) - set(plan)
        if unknown:
            parser.error(f"no benchmark {', '.join(sorted(unknown))}; known: {', '.join(plan)}")
        failed = [name for name in given.names or plan if not _run(name, plan[name])]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _plan(folder: Path, pool: str | None, shots: str | None, prompts: str | None) -> dict[str, list[str]]:
    """Benchmark -> its arguments."""
    data = write_demo_data(folder / "data")
    every_shot = folder / "shots.jsonl"
    every_shot.write_text("".join(path.read_text(encoding="utf-8") for path in data.shots.values()), encoding="utf-8")
    rows, anchors = ["--pool", pool or str(data.pool)], ["--shots", shots or str(every_shot)]
    experts = "10" if shots else str(len(data.shots))
    return {
        "whole_pool": rows,
        "selection_share": [*rows, *anchors, "--budget", "200"],
        "bandits": [*rows, *anchors, "--rows", "4000", "--skills", "1", "--seeds", "1"],
        "embedders": [*rows, *anchors, "--top", "200", "lsa", "minilm"],
        "routing": [*rows, *anchors, "--prompts", prompts or str(data.suite), "--experts", experts],
        "held_out_routing": [
            *("--pool", str(data.pool), "--shots", str(every_shot), "--prompts", str(data.suite)),
            *("--base", base_model(), "--work", str(folder / "held-out"), "--rows", "64", "--own", "8"),
        ],
        "routing_speed": ["--experts", "100,1000", "--requests", "50"],
        "learned_routers": [
            *("--prompts", prompts or str(data.suite), "--train", "100", "--experts", "10", "100", "--repeats", "1"),
        ],
        "aggregators": ["--suite", str(data.suite), "--limit", "1", "--max-tokens", "8"],
        "serving": ["--streams", "4", "--tokens", "8", "--repeats", "1"],
        "server_load": ["--seconds", "30", "--clients", "8"],
        "engine": ["--repeats", "2"],
        "constraints": ["--repeats", "1"],
        "merging": ["--width", "64", "--layers", "1"],
        "training": ["--base", base_model(), "--rows", str(data.pool), "--steps", "3", "--repeats", "2"],
        "registry": ["--experts", "200"],
        "remotes": ["--mebibytes", "8", "--versions", "100"],
        "ranking": ["--largest", "30", "--draws", "100", "--repeats", "1"],
        "less_features": ["--rows", "64", "--repeats", "1"],
        "ekfac": ["--exact-rows", "10", "--rows", "32", "--tokens", "64", "--repeats", "1"],
        "pool_build": ["--rows", "100000"],
        "votek": ["--rows", "2000", "--wanted", "50", "--repeats", "1"],
        "ideal": ["--rows", "1000", "--wanted", "20", "--small-rows", "150", "--small-wanted", "8", "--repeats", "1"],
        "kmeans": ["--rows", "10000", "--clusters", "256", "--repeats", "1"],
        "near_rows": ["--rows", "20000", "--repeats", "1"],
        "dpp": ["--rows", "5000", "--wanted", "300", "--repeats", "1"],
        "kcenter": ["--rows", "20000", "--budget", "300", "--repeats", "1"],
        "near_duplicates": ["--rows", "3000", "--repeats", "1"],
        "facility": ["--rows", "6000", "--budget", "300", "--repeats", "1"],
    }


def _run(name: str, arguments: list[str]) -> bool:
    print(f"\n## {name}\n", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "ROWS": "32", **os.environ}
    return subprocess.run([sys.executable, FOLDER / f"{name}.py", *arguments], env=environment).returncode == 0


if __name__ == "__main__":
    main()
