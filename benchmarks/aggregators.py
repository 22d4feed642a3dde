"""What aggregators make of a mixture's experts, what they cost, and what merging the steps of many questions spares.

    python benchmarks/aggregators.py --suite SUITE [--mixture FILE] [--limit 10] [--max-tokens 24]
                                     [NAME[:KEY=VALUE,...] ...]

The first table scores the items of SUITE (at most `--limit` a skill) by the base, each expert, the route's experts
weighted as one, and behind each aggregator. The second answers the same questions by `majority` in lockstep, and one
after another. Figures are of one run, in CPU seconds of this process; greedy answers do not vary, sampled ones do.
Without a mixture, three random experts of rank 8 on the packaged model answer: then costs are told, and scores are not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.server_load import make_experts
from xpert.data import read_suite
from xpert.experts.aggregated import open_aggregator, question_of, with_aggregator
from xpert.experts.aggregating import aggregate, model_encoding
from xpert.experts.demo.chain import base_model
from xpert.experts.evaluate import EvalOptions, Evaluation, Subject, usable_items
from xpert.experts.mixture import AggregatorChoice, Mixture, assemble, open_expert
from xpert.experts.mixture_file import load_mixture
from xpert.experts.routing import MixtureRouter
from xpert.experts.serving import load_engine
from xpert.experts.staged_subjects import aggregated_subject, requests_of
from xpert.experts.subjects import routed_subject, score_subjects
from xpert.protocols import Sampling

DEFAULT = (
    "majority",
    "weighted",
    "expert",
    "best-of:samples=1",
    "complexity:samples=5,keep=3",
    "choice-shuffle",
    "b4",
    "cook",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("aggregators", nargs="*", metavar="NAME[:KEY=VALUE,...]")
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--mixture", type=Path)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mixture = load_mixture(given.mixture) if given.mixture else _random_experts(Path(folder))
        measure(mixture, given)


def measure(mixture: Mixture, given: argparse.Namespace) -> None:
    options = EvalOptions(max_tokens=given.max_tokens, limit=given.limit)
    items = usable_items(read_suite(given.suite).items, options)
    lm, engine = load_engine(mixture, device="cpu", max_batch=options.max_batch)
    router = MixtureRouter(mixture)
    keys = {key: key for key in mixture.keys}
    as_one = routed_subject("weighted as one", router, keys)
    print(f"{len(items)} items; experts: {', '.join(mixture.keys)}\n")
    print("| | score [95 %] | replies an item | tokens an item | CPU s an item |")
    print("|---|---|---|---|---|")
    subjects = [Subject.fixed("base", ()), *(Subject.fixed(key, ((key, 1.0),)) for key in mixture.keys), as_one]
    for subject in subjects:
        begun = time.process_time()
        _line(score_subjects(lm, engine, [subject], items, options), subject.name, time.process_time() - begun)
    for spec in given.aggregators or DEFAULT:
        aggregator = open_aggregator(_with(mixture, spec))
        assert aggregator is not None
        begun = time.process_time()
        subject = aggregated_subject(as_one, router, aggregator, lm, engine, keys)
        found = score_subjects(lm, engine, [subject], items, options)
        _line(found, subject.name, time.process_time() - begun, shown=spec)
    aggregator = open_aggregator(_with(mixture, "majority"))
    assert aggregator is not None
    sampling = Sampling(max_tokens=given.max_tokens)
    routes = router.route(requests_of(items))
    questions = [question_of(item.row, route, sampling) for item, route in zip(items, routes, strict=True)]
    print("\n| majority | CPU s | wall s |")
    print("|---|---|---|")
    verdicts = []
    for name, at_once in (("in lockstep", len(questions)), ("one after another", 1)):
        begun, wall = time.process_time(), time.perf_counter()
        encoding = model_encoding(lm.tokenizer, engine.context)
        done = aggregate(engine, encoding, aggregator, questions, at_once=at_once)
        verdicts.append([dialogue.verdict and dialogue.verdict.text for dialogue in done])
        print(f"| {name} | {time.process_time() - begun:.1f} | {time.perf_counter() - wall:.1f} |", flush=True)
    same = sum(one == other for one, other in zip(*verdicts, strict=True))
    print(f"\n{same} of {len(questions)} verdicts are the same.")


def _random_experts(folder: Path) -> Mixture:
    folders = make_experts(base_model(), folder, 3)
    return assemble([open_expert(one) for one in folders], router="fixed", name="random")


def _with(mixture: Mixture, spec: str) -> Mixture:
    name, _, params = spec.partition(":")
    pairs = (pair.split("=", 1) for pair in params.split(",") if pair)
    return with_aggregator(mixture, AggregatorChoice(name, dict(pairs)))


def _line(found: Evaluation, name: str, seconds: float, *, shown: str | None = None) -> None:
    score, count = found.interval(name), len(found.items)
    print(
        f"| {shown or name} | {100 * score.score:.1f} [{100 * score.low:.0f}-{100 * score.high:.0f}] "
        f"| {found.generated / count:.1f} | {found.spent['tokens'] / count:.0f} | {seconds / count:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
