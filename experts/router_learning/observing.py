"""Observing a mixture: every expert and the base answer a suite's items once, in mixed batches.

Experts answer alone, with weight 1 and without the mixture's gate or aggregator: what is observed is what a router
chooses among. Batches of items are finished one after another, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xpert.errors import BadInput
from xpert.experts.evaluate import ItemResult, Subject, usable_items
from xpert.experts.journal import append_line, read_journal
from xpert.experts.known_prompts import seen_in_training
from xpert.experts.mixture import BASE, Mixture
from xpert.experts.router_learning.observations import (
    Observed,
    for_mixture,
    is_observations,
    read_observations,
    write_observations,
)
from xpert.experts.router_learning.observe_options import ObserveOptions
from xpert.progress import SILENT, Progress
from xpert.protocols import Engine, EngineRequest, Sampling
from xpert.records import SuiteItem
from xpert.row_files import Suite, read_suite
from xpert.storage import cache_folder, check_output, disk_errors, hash_json

__all__ = ["observe", "observed_on"]

_STEP = 32
"""Items between two saves; each is answered by all subjects."""

_Open = Callable[[], tuple[Any, Engine]]


def observed_on(
    mixture: Mixture,
    source: str | Path,
    options: ObserveOptions | None = None,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Observed:
    """The observations in a folder, or those of a suite: made once into the user's cache, and found there again by the
    experts' weights, the suite's content and the options.

    Raises BadInput where the observations are not of this mixture's experts, or are given options.
    """
    if is_observations(source):
        if options is not None and options != ObserveOptions():
            raise BadInput(
                "was observed already, so it takes no options of observing",
                where=str(source),
                hint="leave them out, or give the suite",
            )
        return for_mixture(read_observations(source), mixture)
    settings = options or ObserveOptions()
    suite = _read(source, settings)
    folder = cache_folder() / "observations" / _key(mixture, suite, settings)[:32]
    if folder.is_dir():
        progress.say(f"observed before: {folder}")
        return for_mixture(read_observations(folder), mixture)
    progress.say(f"observing into {folder}")
    return _observe(mixture, suite, folder, settings, device=device, progress=progress)


def observe(
    mixture: Mixture,
    source: str | Path,
    out: Path,
    options: ObserveOptions | None = None,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Observed:
    """Writes the folder `out`; the same call goes on from what an interrupted one has done.

    Cost: for each item and subject one generation with its log-probabilities, one pass over the reference answer, and
    with metric `likelihood` one per choice. Memory as `evaluate`.
    """
    check_output(out)
    settings = options or ObserveOptions()
    return _observe(mixture, _read(source, settings), out, settings, device=device, progress=progress)


def _read(source: str | Path, options: ObserveOptions) -> Suite:
    return read_suite(source, skip_metrics=options.skip_metric)


def _key(mixture: Mixture, suite: Suite, options: ObserveOptions) -> str:
    """Names what is observed; the mixture's router and the order of its experts change nothing of it."""
    experts = sorted([expert.key, expert.fingerprint] for expert in mixture.experts)
    ids = [item.row.id for item in suite.items]  # no score depends on them, but the rows bear them
    return hash_json([mixture.base.fingerprint, experts, suite.name, suite.fingerprint, ids, options.shaping()])


def _observe(
    mixture: Mixture, suite: Suite, out: Path, options: ObserveOptions, *, device: str, progress: Progress
) -> Observed:
    items = usable_items(suite.items, options)
    seen = {e.key: len(seen_in_training(e.folder, items)) for e in mixture.experts}
    for name, count in seen.items():
        if count:
            progress.say(f"expert {name} was trained on {count:,} of the items: what it scores there, it remembers")
    key = hash_json([_key(mixture, suite, options), list(mixture.keys)])
    partial = out.parent / f".{out.name}.partial"
    begun = time.perf_counter()

    def open_engine() -> tuple[Any, Engine]:
        from xpert.experts.serving import load_engine

        bare = replace(mixture, gate=None)
        return load_engine(bare, device=device, max_batch=options.max_batch, progress=progress)

    with disk_errors(out), _alone(partial, out):
        done = {int(line["index"]): line["row"] for line in read_journal(partial, key)}
        left = [index for index in range(len(items)) if index not in done]
        if done and left:
            progress.say(f"{len(done):,} of {len(items):,} items were observed before; going on with the rest")
        if left:
            with open(partial, "a" if done else "w", encoding="utf-8") as journal:
                if not done:
                    append_line(journal, {"key": key})
                for index, row in _rows(mixture, items, left, options, open_engine, progress):
                    append_line(journal, {"index": index, "row": row})
                    done[index] = row
        found = write_observations(
            out,
            [done[index] for index in range(len(items))],
            mixture,
            suite=suite.name,
            suite_fingerprint=suite.fingerprint,
            config=options.to_dict(),
            seconds=time.perf_counter() - begun,
            seen_in_training={name: count for name, count in seen.items() if count},
        )
        partial.unlink(missing_ok=True)
    return found


@contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    """Raises BadInput where another process is at the same work."""
    import fcntl

    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput("another process is observing into it", where=str(out), hint="wait for it") from None
        yield


def _rows(
    mixture: Mixture,
    items: Sequence[SuiteItem],
    left: Sequence[int],
    options: ObserveOptions,
    open_engine: _Open,
    progress: Progress,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of the items that are left, some at a time."""
    from xpert.experts.subjects import score_subjects

    lm, engine = open_engine()
    subjects = [Subject.fixed(key, ((key, 1.0),)) for key in mixture.keys]
    subjects.append(Subject.fixed(BASE, ()))
    with progress.task("observing", total=len(left)) as task:
        for start in range(0, len(left), _STEP):
            places = left[start : start + _STEP]
            part = [items[place] for place in places]
            found = score_subjects(
                lm,
                engine,
                subjects,
                part,
                options,
                confidences=True,
                weigh_choices=options.metric == "likelihood",
            )
            losses = _reference_losses(lm, engine, mixture, part)
            for row, place in enumerate(places):
                results = [found.results[subject.name][row] for subject in subjects]
                yield place, _row(items[place], results, losses[row], options.metric)
            task.advance(len(places))


def _reference_losses(lm: Any, engine: Engine, mixture: Mixture, items: Sequence[SuiteItem]) -> list[list[float]]:
    """[items][subjects]: mean nats per token of an item's own answer and its end of turn."""
    from xpert.chat_form import answer_ids, encode_prompt

    prompts = [encode_prompt(lm.tokenizer, item.row.messages) for item in items]
    answers = answer_ids(lm.tokenizer, [item.row.response for item in items])
    chosen = [*(((key, 1.0),) for key in mixture.keys), ()]
    requests = [
        EngineRequest(f"{item.row.id} under {experts[0][0] if experts else BASE}", prompt, experts, Sampling())
        for experts in chosen
        for item, prompt in zip(items, prompts, strict=True)
    ]
    found = engine.continuation_logprobs(requests, answers * len(chosen))
    means = np.array([-sum(logprobs) / len(logprobs) for logprobs in found])
    losses: list[list[float]] = means.reshape(len(chosen), len(items)).T.tolist()
    return losses


def _row(item: SuiteItem, results: Sequence[ItemResult], losses: Sequence[float], metric: str) -> dict[str, Any]:
    by_choice = metric == "likelihood" and item.choices is not None
    confidences = [result.confidence for result in results]
    row = {
        "id": item.row.id,
        "messages": item.row.chat(),
        "skill": item.skill,
        "answers": list(item.answers),
        "metric": "likeliest choice" if by_choice else item.metric,
        "outputs": [result.output for result in results],
        "scores": [float(bool(result.choice)) if by_choice else result.score for result in results],
        "losses": list(losses),
        "confidences": [None if c is None or math.isnan(c) else c for c in confidences],
    }
    wrong = next((loss for loss in losses if not math.isfinite(loss)), None)
    if wrong is not None:
        raise BadInput(
            f"the reference answer's loss is {wrong}, which is no number",
            where=f"item {item.row.id}",
            hint="use float32",
        )
    return row
