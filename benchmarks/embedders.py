"""Which embedder finds rows of the shots' skill? Prints a table.

For each skill with shots, the pool's rows are ranked by their greatest cosine to its shots; of the first `--top` rows
the share that carry the shots' skill is counted. `best possible` is what a perfect ranking would reach, since a skill
may have fewer rows than that.

    python benchmarks/embedders.py --pool pool.jsonl.gz --shots shots.jsonl.gz lsa lsa:both minilm

A spec may end in `:prompt`, `:response` or `:both`, the part of a row that is embedded. `lsa?dimensions=128&power=1`
measures other settings of lsa. CPU seconds are those of this process for fitting and embedding the pool.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xpert.data import read_rows, read_shots
from xpert.embedders.lsa import Lsa, Settings
from xpert.embedding import open_embedder
from xpert.features import FIELDS
from xpert.progress import StreamProgress
from xpert.protocols import EmbedderContext, Floats
from xpert.records import Row
from xpert.similarity import max_similarity


@dataclass(frozen=True)
class Figures:
    share: float
    worst: float
    first_hundred: float
    dimensions: int
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="+", help="embedders, as lsa, lsa:both, minilm, st:FOLDER, lsa?dimensions=128")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("--base", help="the base model of lm")
    parser.add_argument("--top", type=int, default=500)
    parser.add_argument("--sample", type=int, help="measure on this many rows of the pool, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pool, shots = read_rows(options.pool), list(read_shots(options.shots))
    if options.sample:
        drawn = np.random.default_rng(options.seed).permutation(len(pool))[: options.sample]
        pool = [pool[row] for row in np.sort(drawn).tolist()]
    skills = np.array([row.skill for row in pool])
    wanted = sorted({str(row.skill) for row in shots} & set(skills.tolist()))
    counts = np.array([(skills == skill).sum() for skill in wanted])
    print(f"{len(pool):,} rows, {len(shots)} shots of {len(wanted)} skills, the first {options.top} rows")
    print(f"best possible {np.minimum(counts / options.top, 1).mean():.3f}\n")
    print("| embedder | share of the skill | of the first 100 | worst skill | d | CPU s |\n|---|---|---|---|---|---|")
    expected = counts / len(pool)
    print(f"| random order | {expected.mean():.3f} | {expected.mean():.3f} | {expected.min():.3f} | | |", flush=True)
    for spec in options.specs:
        found = measure(spec, pool, shots, wanted, options)
        print(
            f"| {spec} | {found.share:.3f} | {found.first_hundred:.3f} | {found.worst:.3f} "
            f"| {found.dimensions} | {found.cpu_seconds:.1f} |",
            flush=True,
        )


def measure(spec: str, pool: list[Row], shots: list[Row], wanted: list[str], options: argparse.Namespace) -> Figures:
    embedder, field = parse(spec, options)
    text = FIELDS[field]
    texts = [text(row.prompt, row.response) for row in pool]
    progress = StreamProgress(every=30)
    started = time.process_time()
    if hasattr(embedder, "fit_embed"):
        embeddings: Floats = embedder.fit_embed(texts, progress)
    else:
        embedder.fit(texts)
        embeddings = embedder.embed(texts, progress)
    spent = time.process_time() - started
    shot_embeddings = embedder.embed([text(row.prompt, row.response) for row in shots])
    of_skill = defaultdict(list)
    for index, row in enumerate(shots):
        of_skill[row.skill].append(index)
    skills = np.array([row.skill for row in pool])
    hits = np.empty((len(wanted), options.top))
    for at, skill in enumerate(wanted):
        scores, _ = max_similarity(embeddings, shot_embeddings[of_skill[skill]])
        hits[at] = skills[np.argsort(-scores, kind="stable")[: options.top]] == skill
    shares = hits.mean(axis=1)
    return Figures(shares.mean(), shares.min(), hits[:, :100].mean(), embeddings.shape[1], spent)


def parse(spec: str, options: argparse.Namespace) -> tuple[Any, str]:
    name, _, field = spec.rpartition(":")
    if field not in FIELDS:
        name, field = spec, "prompt"
    if name.startswith("lsa?"):
        given = dict(pair.split("=") for pair in name.removeprefix("lsa?").split("&"))
        settings = {key: ast.literal_eval(value) for key, value in given.items()}
        return Lsa(EmbedderContext(seed=options.seed), Settings(**settings)), field
    return open_embedder(name, base=options.base, seed=options.seed), field


if __name__ == "__main__":
    main()
