"""How far scores of rows can be trusted on a model: their linear datamodeling score, beside that of random scores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.influence.grouping import shot_groups
from xpert.influence.lds import Interval, agreement, random_control, score_interval
from xpert.influence.retraining import RetrainingOptions, Trainer, draw_subsets
from xpert.progress import SILENT, Progress
from xpert.protocols import Scorer
from xpert.records import Row, Shots

if TYPE_CHECKING:
    from xpert.data import Pool
    from xpert.features import FeatureOptions, Features

__all__ = ["CheckOptions", "InfluenceCheck", "check_influence"]


@dataclass(frozen=True)
class CheckOptions(Config):
    """Which rows and subsets, and how often each is trained on."""

    rows: int = option(64, "rows drawn from the pool, of which the subsets are made", minimum=4)
    subsets: int = option(16, "random subsets that are trained on", minimum=4)
    share: float = option(0.5, "of the rows that each subset holds", minimum=0.01, maximum=0.99)
    trainings: int = option(2, "of each subset, the rows in another order each; their effects are averaged", minimum=1)
    group: str = option("skill", "column by which shots are grouped: each group is a target; none: all are one")


@dataclass(frozen=True)
class MethodScore:
    """What one method reached over all targets and at each, and the CPU seconds it took in this process."""

    name: str
    score: Interval
    targets: Mapping[str, float]
    cpu_seconds: float


@dataclass(frozen=True)
class InfluenceCheck:
    """The figures of a check. Losses are means over the targets, before training and after, over all subsets."""

    methods: Sequence[MethodScore]
    random: Interval
    agreement: float | None
    targets: Sequence[str]
    rows: int
    subset_rows: int
    subsets: int
    trainings: int
    steps: int
    loss_before: float
    loss_after: float
    spread: float = field(default=0.0)
    """Standard deviation of the loss over subsets: what a score is asked to foretell."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_influence(
    pool: Pool,
    *,
    shots: Shots,
    methods: Mapping[str, Mapping[str, Any]],
    features: FeatureOptions,
    targets: Sequence[Row] | None = None,
    options: CheckOptions | None = None,
    retraining: RetrainingOptions | None = None,
    seed: int = 0,
    device: str = "auto",
    executor: str = "local",
    workers: int | None = None,
    progress: Progress = SILENT,
) -> InfluenceCheck:
    """Measures the linear datamodeling score of scorers, `methods` being their names and parameters.

    Rows that overlap the shots or targets, or have no room for their answer, are not drawn. Each group of shots is a
    target of its own: a method is prepared for it alone, and the true effect is the loss of the group's shots, or of
    the `targets` (held-out rows) of the same group. Every training is kept, so that a stopped check goes on, and other
    methods are compared on the same ones. Cost: `subsets` x `trainings` small trainings, and each method's own, once
    per target. Raises BadInput where the pool holds too few rows, and where a method gives a row no score.
    """
    options, retraining = options or CheckOptions(), retraining or RetrainingOptions()
    scorers = {name: _options(name, given) for name, given in methods.items()}
    if not scorers:
        raise BadInput("there is no method to check", hint="name some with --method")
    if not len(shots):
        raise BadInput("there are no shots to check against", hint="give them with --shots FILE")
    named = _targets(shots, targets, options.group, progress)

    from xpert.features import Features

    def open_features(own: Shots) -> Features:
        more: dict[str, Any] = {"device": device, "seed": seed, "executor": executor, "workers": workers}
        return Features(pool, features, shots=own, progress=progress, **more)

    whole = open_features(shots)
    base = whole.base()
    every = [row for _, rows in named.values() for row in rows]
    rng = np.random.default_rng(seed)
    chosen = _draw_rows(pool, [*shots, *every], base, features.max_length, options.rows, rng)
    members = draw_subsets(len(chosen), options.share, options.subsets, rng)
    trainer = _trainer(whole, base, every, retraining)
    before, losses = _retrain(trainer, pool.rows(chosen.tolist()), members, options.trainings, seed, progress)
    groups = np.repeat(np.arange(len(named)), [len(rows) for _, rows in named.values()])
    effects = -_by_group(losses, groups)
    truth = effects.mean(axis=0)
    if not np.ptp(truth, axis=1).all():
        raise BadInput("the trainings changed nothing", hint="raise --learning-rate or --steps")

    found = []
    for name, scorer_options in scorers.items():
        progress.say(f"scoring by {name}")
        started = time.process_time()
        sums = [
            _scores(name, scorer_options, open_features(own), own, chosen, seed) @ members.T
            for own, _ in named.values()
        ]
        spent = time.process_time() - started
        predicted = np.stack(sums)
        score = score_interval(predicted, truth, np.random.default_rng([seed, 2]))
        each = {
            target: score_interval(predicted[[i]], truth[[i]], np.random.default_rng(0), 1).value
            for i, target in enumerate(named)
        }
        found.append(MethodScore(name, score, each, spent))
    return InfluenceCheck(
        methods=found,
        random=random_control(members, truth, np.random.default_rng([seed, 3])),
        agreement=agreement(effects),
        targets=list(named),
        rows=len(chosen),
        subset_rows=int(members[0].sum()),
        subsets=options.subsets,
        trainings=options.trainings,
        steps=retraining.steps,
        loss_before=float(_by_group(before[None], groups).mean()),
        loss_after=float(-truth.mean()),
        spread=float(truth.std(axis=1).mean()),
    )


def _options(name: str, given: Mapping[str, Any]) -> tuple[type[Scorer], Config]:
    scorer_class = plugins.load("scorer", name)
    return scorer_class, scorer_class.Options.from_mapping(dict(given), where=f"method {name}")


def _targets(
    shots: Shots, held_out: Sequence[Row] | None, column: str, progress: Progress
) -> dict[str, tuple[Shots, Sequence[Row]]]:
    """Name of a target -> (its shots, the rows whose loss counts)."""
    names, numbers = shot_groups(shots, column)
    groups = {name: [row for row, own in zip(shots, numbers, strict=True) if own == i] for i, name in enumerate(names)}
    if held_out is None:
        return {name: (Shots(tuple(rows)), rows) for name, rows in groups.items()}
    if not held_out:
        raise BadInput("there are no targets to measure the loss of")
    if len(names) == 1:
        return {names[0]: (shots, held_out)}
    there, theirs = shot_groups(Shots(tuple(held_out)), column)
    labels = [there[number] for number in theirs]
    foreign = sum(label not in groups for label in labels)
    if foreign:
        progress.say(f"{foreign} of {len(labels)} targets are of no group of the shots, and left out")
    found: dict[str, tuple[Shots, Sequence[Row]]] = {}
    for name, rows in groups.items():
        own = [row for row, label in zip(held_out, labels, strict=True) if label == name]
        if not own:
            raise BadInput(f"no target is of {name}, as some shots are", hint="give some, or --group none")
        found[name] = (Shots(tuple(rows)), own)
    return found


def _draw_rows(
    pool: Pool, avoided: Sequence[Row], base: str, max_length: int, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`count` pool rows at random, ascending, that overlap none of `avoided` and have room for their answer."""
    from xpert.data import overlapping_rows
    from xpert.language_model import load_tokenizer
    from xpert.linear_capture import encode_rows

    gone, _ = overlapping_rows(pool, avoided)
    left = rng.permutation(np.setdiff1d(np.arange(len(pool), dtype=np.int64), gone))
    tokenizer = load_tokenizer(base)
    found: list[int] = []
    for start in range(0, len(left), count):
        part = left[start : start + count].tolist()
        examples = encode_rows(tokenizer, pool.rows(part), max_length)
        found += [row for row, (ids, begin) in zip(part, examples, strict=True) if max(begin, 1) < len(ids)]
        if len(found) >= count:
            return np.array(sorted(found[:count]), np.int64)
    raise BadInput(
        f"{count} rows are wanted, but the pool holds {len(found)} that do not overlap the shots and have room for "
        "their answer",
        hint="lower --rows, or take a larger pool",
    )


def _trainer(features: Features, base: str, targets: Sequence[Row], options: RetrainingOptions) -> Trainer:
    from xpert.array_cache import ArrayCache
    from xpert.language_model import load_model, model_fingerprint, resolve_device

    identity = f"{model_fingerprint(base)} {resolve_device(features.device).type}"

    def load() -> Any:
        return load_model(base, device=features.device, dtype="float32")

    cache = ArrayCache(features.folder, features.progress)
    return Trainer(load, identity, targets, options, features.options.max_length, cache)


def _retrain(
    trainer: Trainer,
    rows: Sequence[Row],
    members: NDArray[np.bool_],
    trainings: int,
    seed: int,
    progress: Progress,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Losses of the targets before [K] and after [S, M, K] each training on each subset."""
    before = trainer.losses([], seed)
    losses = np.empty((trainings, len(members), len(before)), np.float32)
    with progress.task("training on subsets", trainings * len(members)) as task:
        for number, member in enumerate(members):
            own = [rows[index] for index in np.flatnonzero(member).tolist()]
            for training in range(trainings):
                losses[training, number] = trainer.losses(own, seed + training)
                task.advance(1)
    return before, losses


def _by_group(losses: NDArray[np.float32], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Means over the targets of each group: [..., M, K] -> [..., T, M], or [1, K] -> [T, 1]."""
    means = [losses[..., groups == group].mean(axis=-1, dtype=np.float64) for group in range(groups.max() + 1)]
    return np.stack(means, axis=-2)


def _scores(
    name: str,
    scorer: tuple[type[Scorer], Config],
    features: Features,
    shots: Shots,
    rows: NDArray[np.int64],
    seed: int,
) -> NDArray[np.float64]:
    """float64 [n] of the drawn rows by a scorer prepared for these shots."""
    scorer_class, settings = scorer
    opened = scorer_class(settings)
    opened.prepare(features, shots, np.random.default_rng(seed))
    scores = np.asarray(opened.score(rows), np.float64)
    unscored = np.flatnonzero(~np.isfinite(scores))
    if len(unscored):
        row = int(rows[unscored[0]])
        named = features.pool.rows([row])[0].id
        raise BadInput(f"{name} gives row {named} no score: {opened.explain(row)}", hint="leave that row out")
    return scores
