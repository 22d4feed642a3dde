"""Routers against the oracle on held-out prompts, with experts of a small model.

    python benchmarks/held_out_routing.py --pool POOL --shots SHOTS --prompts SUITE --base MODEL --work DIR
        [--skills A,B] [--rows 400] [--own 24] [--foreign 10] [NAME:KEY=VALUE,... ...]

Every skill of SHOTS (or --skills) gets an expert: LoRA on --rows rows of the skill, drawn from POOL. Of SUITE, --own
items of each expert's skill and --foreign of each other skill are what routers learn from, and as many more what they
are measured on; both are observed. Experts are profiled on the former. Without names, all routers with their defaults.
What lies in DIR already is used as it is, so that a stopped run goes on, and routers can be measured without a model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from xpert import plugins
from xpert.data import open_pool, read_shots, read_suite
from xpert.errors import XpertError
from xpert.experts.evaluate import Evaluation, ItemResult
from xpert.experts.mixture import BASE, Mixture, assemble, open_expert
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.experts.profiles import Views, as_profile, write_profile
from xpert.experts.router_learning.evaluating import RouterChoice, RouterFigures, evaluate_routers
from xpert.experts.router_learning.observations import Observed, for_mixture, read_observations
from xpert.experts.router_learning.observe_options import ObserveOptions
from xpert.experts.router_learning.observing import observe
from xpert.experts.term_keywords import keywords_by_terms
from xpert.experts.train import train
from xpert.experts.train_options import TrainOptions
from xpert.progress import StreamProgress
from xpert.records import Shots
from xpert.selection import select
from xpert.selection_folder import write_rows

LONGEST = 400
"""Characters of a prompt, and 60 of an answer, beyond which rows are left out: they would take most of the time."""
LEAST_ITEMS = 3
"""Items of a keyword."""
METRICS = ("exact", "choice", "number", "f1", "set")
TRAINING = TrainOptions(rank=8, alpha=16, dropout=0.0, learning_rate=1e-3, epochs=1.0, batch_size=8, max_length=200)
OBSERVING = ObserveOptions(max_tokens=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--pool", "--shots", "--prompts", "--base"):
        parser.add_argument(name, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for experts and observations")
    parser.add_argument("--skills", help="which skills get experts; default: all of the shots")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--own", type=int, default=24)
    parser.add_argument("--foreign", type=int, default=10)
    parser.add_argument("routers", nargs="*", metavar="NAME:KEY=VALUE,...")
    given = parser.parse_args()
    wanted = given.skills.split(",") if given.skills else sorted({str(row.skill) for row in read_shots(given.shots)})
    mixture = _mixture(given.work, wanted, given.pool, given.shots, given.base, given.rows)
    _split(given.work, given.prompts, set(wanted), given.own, given.foreign)
    train_on, test_on = (_observed(given.work, mixture, part) for part in ("train", "test"))
    _profile(given.work, mixture, train_on)
    mixture = load_mixture(given.work / "mixture.json")
    _table(mixture, train_on, test_on, given.routers or plugins.names("router"))


def _mixture(work: Path, skills: Sequence[str], pool: str, shots: str, base: str, rows: int) -> Mixture:
    """The experts behind router centroid; those that lie in the folder are not trained again."""
    if (work / "mixture.json").is_file():
        return load_mixture(work / "mixture.json")
    progress = StreamProgress()
    for skill in skills:
        if (work / "experts" / skill / "expert.json").is_file():
            continue
        source = open_pool(pool)
        own = [place for place, name in enumerate(source.skills()) if name == skill]
        kept = [row for row in source.rows(own) if len(row.prompt) <= LONGEST and len(row.response) <= 60]
        write_rows(work / "pools" / f"{skill}.jsonl", kept)
        anchors = Shots(tuple(row for row in read_shots(shots) if row.skill == skill))
        selection = select(
            work / "pools" / f"{skill}.jsonl",
            shots=anchors,
            method="uniform",
            budget=str(min(rows, len(kept) // 2)),
            out=work / "selections" / skill,
            progress=progress,
        )
        train(selection.path, base, work / "experts" / skill, TRAINING, progress=progress)
    experts = [open_expert(work / "experts" / skill) for skill in skills]
    write_mixture(work / "mixture.json", assemble(experts, router="centroid"))
    return load_mixture(work / "mixture.json")


def _split(work: Path, suite: str, own: set[str], most: int, foreign: int) -> None:
    """Writes train.jsonl and test.jsonl, of which the first `own` or `foreign` items of a skill are for training."""
    if all((work / f"{part}.jsonl").is_file() for part in ("train", "test")):
        return
    by_skill: dict[str, list[dict[str, object]]] = {}
    for item in read_suite(suite, skip_metrics=("exec",)).items:
        if item.metric in METRICS and len(item.row.prompt) <= LONGEST:
            by_skill.setdefault(item.skill, []).append(dict(item.row.columns))
    draw = random.Random(1)
    parts: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for skill, rows in sorted(by_skill.items()):
        draw.shuffle(rows)
        count = min(most if skill in own else foreign, len(rows) // 2)
        parts["train"] += rows[:count]
        parts["test"] += rows[count : 2 * count]
    for name, lines in parts.items():
        draw.shuffle(lines)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _observed(work: Path, mixture: Mixture, part: str) -> Observed:
    folder = work / "observed" / part
    if not folder.is_dir():
        observe(mixture, work / f"{part}.jsonl", folder, OBSERVING, progress=StreamProgress())
    return for_mixture(read_observations(folder), mixture)


def _profile(work: Path, mixture: Mixture, seen: Observed) -> None:
    """Profiles by skill and keyword for the routers that read them, of the answers observed in training alone."""
    items = read_suite(work / "train.jsonl").items
    results = {
        subject: [
            ItemResult(item.row.id, item.skill, outputs[column], float(scores[column]), None, ())
            for item, outputs, scores in zip(items, seen.outputs, seen.observations.scores, strict=True)
        ]
        for column, subject in enumerate(seen.observations.subjects)
    }
    found = Evaluation(items, results)
    views = Views(keywords=keywords_by_terms([item.row.prompt for item in items], LEAST_ITEMS))
    for expert in mixture.experts:
        if expert.card.profile is None:
            profile = as_profile(
                found, expert.key, BASE, suite=seen.suite, suite_fingerprint=seen.suite_fingerprint, views=views
            )
            write_profile(expert.folder, profile, found, on_hub=False)


def _table(mixture: Mixture, train_on: Observed, test_on: Observed, routers: Sequence[str]) -> None:
    means = dict(zip(test_on.observations.subjects, test_on.observations.scores.mean(axis=0).tolist(), strict=True))
    print(f"{len(train_on)} prompts to learn from, {len(test_on)} to measure on. Alone on these:", end=" ")
    print(", ".join(f"{name} {100 * mean:.1f}" for name, mean in means.items()) + ".\n")
    columns = ("router", "score", "as good as the best answer", "where answers differ", "regret", "to the base")
    print("| " + " | ".join((*columns, "answers a prompt", "ms a prompt")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    refused: list[str] = []
    found = None
    for text in routers:
        try:
            found = evaluate_routers(mixture, train_on, [RouterChoice.parse(text)], held_out=test_on)
        except XpertError as error:
            refused.append(f"{text}: {error}")
            continue
        print(_line(found.routers[-1]), flush=True)
    for one in found.controls if found is not None else ():
        print(_line(one))
    for line in refused:
        print(f"\nNot measured: {line}")


def _line(one: RouterFigures) -> str:
    spent = f"{one.milliseconds:.2f}" if one.milliseconds is not None else ""
    return (
        f"| {one.name} | {100 * one.score.score:.1f} [{100 * one.score.low:.0f}, {100 * one.score.high:.0f}] "
        f"| {100 * one.accuracy:.1f} % | {100 * (one.where_it_matters or 0):.1f} % | {100 * one.regret.score:.1f} "
        f"[{100 * one.regret.low:.0f}, {100 * one.regret.high:.0f}] | {100 * one.to_base:.1f} % | {one.answers:.2f} "
        f"| {spent} |"
    )


if __name__ == "__main__":
    main()
