"""Near duplicates among texts beside datasketch and rensa alone: CPU seconds on one thread, and what is found.

    python benchmarks/near_duplicates.py [--rows 20000] [--threshold 0.8] [--repeats 3] [--peers PYTHON]

datasketch is run by PYTHON, which needs `pip install datasketch`; this interpreter by default. Texts are made up: 40 to
120 words of a vocabulary of 5,000, common words being common; a fifth of the rows repeat an earlier one with up to a
tenth of its words replaced. The truth is the Jaccard similarity of the three-word runs of a repeat and its original.

The peers get the same runs and do what their own guides show: MinHash of 128 permutations, each row looked up among
the earlier ones, then added. They take what falls into a bucket at its word; xpert compares the texts as well
(boilerplate aside), which is included in its time. A row counts as found where it is flagged at all; xpert does not
compare with rows that it has dropped. Flagged rows below the threshold are the rows whose original is not so alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xpert.boilerplate import Boilerplate, whole_texts
from xpert.near_duplicates import NearDuplicates
from xpert.words import hash_words

SHINGLES = """
def shingles(text):
    words = text.split()
    return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}
"""
PEERS = {
    "datasketch": """
import json, sys, time
try:
    from datasketch import MinHash, MinHashLSH
except ImportError as error:
    sys.exit(f"missing: {error.name}")
texts, threshold = json.load(open(sys.argv[1])), float(sys.argv[2])
started = time.process_time()
lsh, flagged = MinHashLSH(threshold=threshold, num_perm=128), []
for row, text in enumerate(texts):
    signature = MinHash(num_perm=128)
    signature.update_batch([run.encode() for run in shingles(text)])
    if lsh.query(signature):
        flagged.append(row)
    lsh.insert(row, signature)
print(json.dumps({"seconds": time.process_time() - started, "flagged": flagged}))
""",
    "rensa": """
import json, sys, time
try:
    from rensa import RMinHash, RMinHashLSH
except ImportError as error:
    sys.exit(f"missing: {error.name}")
texts, threshold = json.load(open(sys.argv[1])), float(sys.argv[2])
started = time.process_time()
lsh, flagged = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=16), []
for row, text in enumerate(texts):
    signature = RMinHash(num_perm=128, seed=42)
    signature.update(list(shingles(text)))
    if lsh.query(signature):
        flagged.append(row)
    lsh.insert(row, signature)
print(json.dumps({"seconds": time.process_time() - started, "flagged": flagged}))
""",
}


def made_up(rows: int, seed: int = 0) -> tuple[list[str], dict[int, int]]:
    """Texts, and of each repeat the row that it repeats."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, 5001) ** 0.8
    chance /= chance.sum()
    texts: list[list[str]] = []
    repeats: dict[int, int] = {}
    for row in range(rows):
        if row and rng.random() < 0.2:
            repeats[row] = int(rng.integers(row))
            spelt = list(texts[repeats[row]])
            for place in rng.integers(len(spelt), size=int(rng.integers(0, len(spelt) // 10 + 1))):
                spelt[place] = _word(int(rng.integers(5000)))
        else:
            spelt = [_word(number) for number in rng.choice(5000, int(rng.integers(40, 121)), p=chance)]
        texts.append(spelt)
    return [" ".join(spelt) for spelt in texts], repeats


def _word(number: int) -> str:
    letters = "bcdfghjklmnprstvwz", "aeiou"
    spelt = ""
    for place in range(4):
        number, letter = divmod(number, len(letters[place % 2]))
        spelt += letters[place % 2][letter]
    return spelt


def jaccard(one: str, two: str) -> float:
    runs = []
    for text in (one, two):
        words = text.split()
        runs.append({tuple(words[at : at + 3]) for at in range(len(words) - 2)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def by_xpert(texts: list[str], threshold: float) -> dict[str, Any]:
    """As the building of a pool does it, each text a prompt without an answer: answers have a rule of their own."""
    sides = [(text, "") for text in texts]
    columns = [pa.array([side[part] for side in sides], pa.large_string()) for part in (0, 1)]
    batches = pa.Table.from_arrays(columns, ["prompt", "response"]).to_batches(max_chunksize=4096)
    started = time.process_time()
    boilerplate = Boilerplate.learn(batches, len(texts))
    near = NearDuplicates(threshold, boilerplate)
    for batch in batches:
        source = hash_words(whole_texts(batch))
        near.add(source, boilerplate.covers(source))
    pairs = near.find(lambda numbers: [sides[number] for number in numbers.tolist()])
    return {"seconds": time.process_time() - started, "flagged": sorted({pair.later for pair in pairs})}


def by_peer(name: str, python: str, texts: list[str], threshold: float) -> dict[str, Any] | str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        run = subprocess.run(
            [python, "-c", SHINGLES + PEERS[name], str(file), str(threshold)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if run.returncode and run.stderr.strip().startswith("missing: "):
        return f"not run, {run.stderr.strip()}: pip install {name}"
    run.check_returncode()
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    given = parser.parse_args()
    texts, repeats = made_up(given.rows)
    true = {row for row, of in repeats.items() if jaccard(texts[row], texts[of]) >= given.threshold}
    by_xpert(texts[:100], given.threshold)  # what is loaded on first use is no part of the time
    seconds: dict[str, list[float]] = {}
    flagged: dict[str, set[int]] = {}
    missing: dict[str, str] = {}
    for _ in range(given.repeats):
        for name in ("xpert", "rensa", "datasketch"):
            if name == "xpert":
                found: dict[str, Any] | str = by_xpert(texts, given.threshold)
            else:
                python = given.peers if name == "datasketch" else sys.executable
                found = by_peer(name, python, texts, given.threshold)
            if isinstance(found, str):
                missing[name] = found
            else:
                seconds.setdefault(name, []).append(found["seconds"])
                flagged[name] = set(found["flagged"])
    print(f"{len(texts):,} texts, {len(true):,} of which repeat an earlier one at {given.threshold} or more\n")
    print("| method | CPU s | times xpert's | recall | flagged, but below the threshold |\n|---|---|---|---|---|")
    own = statistics.median(seconds["xpert"])
    for name, each in seconds.items():
        recall = len(true & flagged[name]) / max(1, len(true))
        median = statistics.median(each)
        print(f"| {name} | {median:.2f} | {median / own:.1f} | {recall:.4f} | {len(flagged[name] - true):,} |")
    for name, why in missing.items():
        print(f"| {name} | {why} | | | |")


if __name__ == "__main__":
    main()
