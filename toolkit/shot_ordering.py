"""Which labelled shots stand in a prompt as exemplars, and in what order: the one function behind every orderer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert import plugins
from xpert.errors import BadInput
from xpert.overlap import same_text_key
from xpert.pool import pool_from_rows
from xpert.progress import SILENT, Progress
from xpert.protocols import ExemplarOrderer, Exemplars, ExemplarTask
from xpert.records import Row, Shots
from xpert.row_files import read_prompts, read_shots
from xpert.shot_files import check_shot_file, exemplar_lines, prompt_lines, write_shot_file
from xpert.storage import cache_folder, hash_texts, manifest_value

if TYPE_CHECKING:
    from xpert.exemplar_scores import ExemplarScores
    from xpert.features import FeatureOptions, Features

__all__ = ["OrderedShots", "choose_exemplars", "order_shots"]


@dataclass(frozen=True)
class OrderedShots:
    """One list of exemplars for all queries, or one per query; `lists` hold indices into `shots`."""

    shots: Shots
    queries: tuple[Row, ...]
    lists: Sequence[Exemplars]
    figures: Mapping[str, Any]

    def exemplars(self, place: int = 0) -> list[Row]:
        """The rows of a list, in the order of the prompt."""
        return [self.shots.rows[row] for row in self.lists[place].rows]


def order_shots(
    shots: Shots | Path | str,
    *,
    count: int,
    method: str = "nearest",
    queries: Sequence[Row] | Path | str | None = None,
    params: Mapping[str, Any] | None = None,
    features: FeatureOptions | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> OrderedShots:
    """Orders `count` of the shots as exemplars by `method` (see `xpert methods --kind orderer`).

    `queries` are the prompts to be answered; methods that score lists on them need their answers. With `out` it writes
    JSON lines, and a manifest beside them: the exemplars in the order of the prompt, or for a method with a list per
    query a few-shot prompt per query. Raises BadInput where something needed is not given or something given is not
    used, where `count` is more than the shots, and where a query is one of the shots, whose answer would give it away.
    """
    from xpert.features import FeatureOptions, Features

    target = Path(out) if out is not None else None
    if target is not None:
        check_shot_file(target)
    orderer_class = plugins.load("orderer", method)
    options = orderer_class.Options.from_mapping(dict(params or {}), where=f"orderer {method}")
    labelled = read_shots(shots) if isinstance(shots, str | Path) else shots
    feature_options = features or FeatureOptions()
    asked = _queries(queries, method, orderer_class.needs, labelled)
    if "base" in orderer_class.needs and feature_options.base is None:
        raise BadInput(f"method {method!r} scores lists with a base model", hint="give it with --base MODEL")
    _check_count(count, labelled)
    computed = Features(
        pool_from_rows(labelled.rows), feature_options, shots=labelled, device=device, seed=seed, progress=progress
    )
    scores = _scores(computed, labelled, asked, count) if "score" in orderer_class.needs else None
    task = ExemplarTask(labelled, computed, asked, scores)
    started = time.perf_counter()
    lists = choose_exemplars(orderer_class(options), task, count, seed=seed)
    figures = _figures(labelled, lists, scores)
    found = OrderedShots(labelled, asked, lists, figures)
    if target is not None:
        manifest = manifest_value(
            "ordered shots",
            inputs={"shots": labelled.fingerprint, "queries": _fingerprint(asked)},
            config={
                "method": method,
                "params": options.to_dict(),
                "count": count,
                "features": feature_options.to_dict(),
            },
            seed=seed,
            figures={**figures, "log": [dict(step) for one in lists for step in one.log]},
            timings={"order": time.perf_counter() - started},
        )
        per_query = lists[0].query is not None
        lines = prompt_lines(labelled, asked, lists) if per_query else exemplar_lines(labelled, lists[0])
        write_shot_file(target, lines, manifest)
    return found


def choose_exemplars(orderer: ExemplarOrderer, task: ExemplarTask, count: int, *, seed: int = 0) -> list[Exemplars]:
    """Runs an orderer and checks what it gives; writes nothing.

    Raises BadInput where there are fewer shots, ValueError where the orderer breaks its contract.
    """
    _check_count(count, task.shots)
    name = type(orderer).__name__
    lists = orderer.order(task, count, np.random.default_rng(seed))
    wanted = [None] if [one.query for one in lists] == [None] else list(range(len(task.queries)))
    if not lists or [one.query for one in lists] != wanted:
        raise ValueError(f"{name} gave neither one list nor one for each query in order")
    for one in lists:
        rows = one.rows
        if len(rows) != count or len(np.unique(rows)) != count or rows.min() < 0 or rows.max() >= len(task.shots):
            raise ValueError(f"{name} gave a list that is not of {count} different shots")
        if len(one.reasons) != count or not np.isfinite(one.score):
            raise ValueError(f"{name} gave a list without a reason per shot and a finite score")
    return lists


def _queries(
    given: Sequence[Row] | Path | str | None, method: str, needs: frozenset[str], shots: Shots
) -> tuple[Row, ...]:
    """The queries, after checking that they are wanted, and that they have answers where these are read."""
    wanted, scored = "queries" in needs, "score" in needs
    if given is None:
        if wanted:
            what = "rows with answers, on which lists are scored" if scored else "the prompts to be answered"
            raise BadInput(f"method {method!r} needs queries: {what}", hint="give them with --queries FILE")
        return ()
    if not wanted:
        raise BadInput(f"method {method!r} makes one list whatever is asked", hint="leave --queries out")
    where = str(given) if isinstance(given, str | Path) else None
    rows = tuple(read_prompts(given) if isinstance(given, str | Path) else given)
    if not rows:
        raise BadInput("there are no queries", where=where)
    if scored:
        _check_answered(rows, shots, where)
    return rows


def _check_answered(rows: Sequence[Row], shots: Shots, where: str | None) -> None:
    asked = {same_text_key(shot.prompt): shot.id for shot in shots}
    for row in rows:
        if not row.response:
            raise BadInput(
                f"query {row.id} has no answer, on which lists could be scored",
                where=where,
                hint="add the answer, or leave the row out",
            )
        if same_text_key(row.prompt) in asked:
            raise BadInput(
                f"query {row.id} asks what shot {asked[same_text_key(row.prompt)]} asks, so its answer would stand in "
                "its own prompt",
                where=where,
                hint="score on rows that are not among the shots",
            )


def _check_count(count: int, shots: Shots) -> None:
    if count < 1:
        raise BadInput(f"--count is {count}; the least is 1")
    if count > len(shots):
        raise BadInput(f"{count:,} exemplars are asked for, but the shots are {len(shots):,}", hint="lower --count")


def _scores(features: Features, shots: Shots, queries: Sequence[Row], count: int) -> ExemplarScores:
    from xpert.exemplar_scores import ExemplarScores
    from xpert.language_model import load_model

    lm = load_model(features.base(), device=features.device, progress=features.progress)
    folder = cache_folder() / "exemplars"
    scores = ExemplarScores(lm, shots, queries, max_length=features.options.max_length, folder=folder)
    scores.check(count)
    return scores


def _figures(shots: Shots, lists: Sequence[Exemplars], scores: ExemplarScores | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "shots": len(shots),
        "lists": len(lists),
        "score": round(float(np.mean([one.score for one in lists])), 6),
    }
    if scores is not None:
        figures |= {"lists_scored": len(lists[0].log), "lists_read_by_the_model": scores.read}
    return figures


def _fingerprint(queries: Sequence[Row]) -> str | None:
    return hash_texts(text for row in queries for text in (row.prompt, row.response)) if queries else None
