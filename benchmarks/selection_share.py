"""How often the rows selected for eight shots of a skill carry that skill: mean share over the skills of a shots file.

    python benchmarks/selection_share.py --pool POOL --shots SHOTS [--embedder lsa ...] [--variant "kshot tau=1" ...]

POOL and SHOTS are any sources whose rows have a `skill`. Shots of one skill at a time anchor the selection; rows that
overlap them are left out. Prints a Markdown table: the mean over the skills, and each skill.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np

from xpert import plugins
from xpert.data import open_pool, overlapping_rows, read_shots
from xpert.features import FeatureOptions, Features
from xpert.progress import StreamProgress
from xpert.records import Budget, Row, Shots
from xpert.selection import choose

VARIANTS = [
    "random",
    "kshot",
    "kshot order=turns",
    "kshot order=mean",
    "kshot tau=1",
    "kshot reach=1000",
    "mmr",
    "facility mode=shots",
]


def main() -> None:
    arguments = _arguments()
    pool = open_pool(arguments.pool, progress=StreamProgress())
    skills = np.array(pool.skills(), dtype=object)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in read_shots(arguments.shots):
        groups[str(row.skill)].append(row)
    columns: dict[str, dict[str, float]] = {}
    for embedder in arguments.embedder:
        for skill, rows in groups.items():
            shots = Shots(tuple(rows))
            excluded, _ = overlapping_rows(pool, shots)
            options = FeatureOptions(embedder=embedder, embed_field=arguments.embed_field, base=arguments.base)
            features = Features(pool, options, shots=shots)
            features.embeddings(), features.shot_embeddings()  # not part of a selection's time
            for variant in arguments.variant or VARIANTS:
                method, *params = variant.split()
                selector = plugins.load("selector", method)
                settings = selector.Options.from_mapping(dict(pair.split("=", 1) for pair in params))
                started = time.process_time()
                found = choose(selector(settings), features, shots, Budget.parse(arguments.budget), excluded=excluded)
                spent = time.process_time() - started
                name = variant if method == "random" else f"{variant} ({embedder})"
                columns.setdefault(name, {})[skill] = float(np.mean(skills[found.rows] == skill))
                columns[name][" CPU s"] = columns[name].get(" CPU s", 0.0) + spent / len(groups)
    _print(columns, {skill: float(np.mean(skills == skill)) for skill in groups}, len(pool))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--shots", required=True)
    parser.add_argument("--budget", default="500")
    parser.add_argument("--embedder", nargs="+", default=["lsa"])
    parser.add_argument("--embed-field", default="prompt")
    parser.add_argument("--base")
    parser.add_argument("--variant", nargs="+", help=f"method and its parameters; default: {VARIANTS}")
    return parser.parse_args()


def _print(columns: dict[str, dict[str, float]], pool: dict[str, float], rows: int) -> None:
    print(f"pool: {rows:,} rows\n")
    print("| method | mean share | least | CPU s a selection |\n|---|---|---|---|")
    for name, shares in columns.items():
        own = [shares[skill] for skill in pool]
        print(f"| {name} | {np.mean(own):.3f} | {min(own):.3f} | {shares[' CPU s']:.2f} |")
    print("\n| skill | in the pool | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for skill, share in sorted(pool.items()):
        print(f"| {skill} | {share:.3f} | " + " | ".join(f"{column[skill]:.3f}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
