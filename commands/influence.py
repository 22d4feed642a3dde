"""`xpert influence check`: how far a method's scores can be trusted on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options, config_options, pairs, take
from xpert.errors import BadInput
from xpert.features import FeatureOptions
from xpert.influence.check import CheckOptions
from xpert.influence.retraining import RetrainingOptions
from xpert.pool_build import PoolOptions

if TYPE_CHECKING:
    from xpert.influence.check import InfluenceCheck
    from xpert.records import Row

__all__ = ["command"]


@click.group()
def command() -> None:
    """Measure how far scores of rows can be trusted on a model."""


@command.command()
@click.argument("pool", metavar="POOL")
@click.option("--shots", required=True, metavar="FILE", help="The examples of the task.")
@click.option(
    "--method", "methods", default="ekfac,similarity", show_default=True, metavar="A,B,...", help="Scorers to check."
)
@click.option(
    "-p", "--param", "params", multiple=True, metavar="METHOD.KEY=VALUE", help="A parameter of a method; repeatable."
)
@click.option("--targets", metavar="FILE", help="Held-out rows whose loss counts, in place of the shots'.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="The same, from a suite of test items.")
@click.option(
    "--executor", default="local", show_default=True, metavar="NAME", help="What runs models over the rows: local, ray."
)
@click.option("--workers", type=int, metavar="N", help="Workers of the executor ray.  [default: one per GPU, or CPU]")
@config_options(CheckOptions)
@config_options(RetrainingOptions)
@config_options(FeatureOptions)
@config_options(PoolOptions)
@common_options
def check(
    session: Session,
    pool: str,
    shots: str,
    methods: str,
    params: tuple[str, ...],
    targets: str | None,
    suite: Path | None,
    executor: str,
    workers: int | None,
    **options: Any,
) -> None:
    """Measure the linear datamodeling score (LDS) of methods on rows of POOL.

    A small adapter is trained on each of some random subsets of rows, from one start; the LDS is the rank correlation
    between how far each training lowered the loss on the shots and the summed scores of its rows: 1 foretells it, 0
    does not. Every training is kept: a stopped check goes on, and other methods are compared on the same trainings.
    """
    from xpert.data import open_pool, read_shots
    from xpert.influence.check import check_influence

    check_options, retraining = take(CheckOptions, options), take(RetrainingOptions, options)
    features, pool_options = take(FeatureOptions, options), take(PoolOptions, options)
    found = check_influence(
        open_pool(pool, options=pool_options, progress=session.progress),
        shots=read_shots(shots),
        methods=_methods(methods, params),
        features=features,
        targets=_held_out(targets, suite),
        options=check_options,
        retraining=retraining,
        seed=session.seed,
        device=session.device,
        executor=executor,
        workers=workers,
        progress=session.progress,
    )
    session.result(found.to_dict(), _table(found))


def _methods(names: str, params: Sequence[str]) -> dict[str, dict[str, str]]:
    """Method -> its parameters, from `A,B` and `A.key=value`."""
    found: dict[str, dict[str, str]] = {}
    for name in (part.strip() for part in names.split(",")):
        if not name or name in found:
            raise BadInput(f"--method {names!r} names {'nothing' if not name else name + ' twice'}")
        found[name] = {}
    for key, value in pairs(params, option="--param").items():
        method, dot, parameter = key.partition(".")
        if not dot or method not in found:
            raise BadInput(f"--param {key!r} is of none of the methods", hint=f"write {next(iter(found))}.KEY=VALUE")
        found[method][parameter] = value
    return found


def _held_out(targets: str | None, suite: Path | None) -> list[Row] | None:
    from dataclasses import replace

    from xpert.data import read_shots, read_suite

    if targets and suite:
        raise BadInput("--targets and --suite both say whose loss counts", hint="give one of them")
    if suite:
        return [replace(item.row, skill=item.skill) for item in read_suite(suite)]
    return list(read_shots(targets)) if targets else None


def _table(found: InfluenceCheck) -> str:
    lines = [
        f"{found.rows} rows; {found.subsets} subsets of {found.subset_rows}, each trained {found.trainings} times for "
        f"{found.steps} steps",
        f"mean loss of {len(found.targets)} target(s): {found.loss_before:.4f} before training, "
        f"{found.loss_after:.4f} after (standard deviation over subsets {found.spread:.4f})",
        "",
        f"{'method':<16} {'LDS':>6}  {'95 % interval':>16}  {'CPU s':>7}",
    ]
    for method in found.methods:
        interval = f"[{method.score.low:.2f}, {method.score.high:.2f}]"
        lines.append(f"{method.name:<16} {method.score.value:>6.2f}  {interval:>16}  {method.cpu_seconds:>7.1f}")
    control = f"[{found.random.low:.2f}, {found.random.high:.2f}]"
    lines.append(f"{'random scores':<16} {found.random.value:>6.2f}  {control:>16}")
    lines += ["", _ceiling(found.agreement)]
    if len(found.targets) > 1:
        lines += ["", *_by_target({method.name: method.targets for method in found.methods}, found.targets)]
    return "\n".join(lines)


def _ceiling(agreement: float | None) -> str:
    if agreement is None:
        return "one training a subset: how well it would repeat is not known (--trainings 2 tells)"
    return (
        f"the mean of the trainings would repeat at a rank correlation of {agreement:.2f}: "
        f"no method can be expected above {agreement**0.5:.2f}"
    )


def _by_target(scores: Mapping[str, Mapping[str, float]], targets: Sequence[str]) -> list[str]:
    lines = [f"{'LDS by target':<28} " + " ".join(f"{name:>12}" for name in scores)]
    lines += [
        f"{target[:28]:<28} " + " ".join(f"{own[target]:>12.2f}" for own in scores.values()) for target in targets
    ]
    return lines
