"""`xpert shots pick` and `xpert shots order`: which rows to label, and how labelled ones stand in a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, pairs, take
from xpert.features import FeatureOptions
from xpert.pool_build import PoolOptions

__all__ = ["command"]

_count = click.option("--count", type=click.IntRange(1), required=True, metavar="K", help="How many rows.")
_param = click.option(
    "-p", "--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the method; may be repeated."
)
_out = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE.jsonl", help="To write."
)
_SHOWN = 12


@click.group()
def command() -> None:
    """Pick which rows to label, or order labelled shots as exemplars for a prompt."""


@command.command()
@click.argument("pool", metavar="POOL")
@click.option("--method", default="kcenter", show_default=True, metavar="NAME", help="Any that needs no shots.")
@_count
@_param
@_out
@config_options(FeatureOptions)
@config_options(PoolOptions, skip=("duplicates", "near_duplicates", "near_threshold"))
@common_options
def pick(
    session: Session, pool: str, method: str, count: int, params: tuple[str, ...], out: Path, **options: Any
) -> None:
    """Pick the K rows of an unlabelled POOL that are most worth labelling.

    POOL is a pool folder or any source; its rows need no answers. FILE.jsonl gets a line per row, most wanted first,
    with an empty `completion`: fill it in, and the file is your shots. How it was made stands in FILE.manifest.json.
    """
    from xpert.shot_picking import pick_rows

    features, reading = take(FeatureOptions, options), take(PoolOptions, options)
    found = pick_rows(
        pool,
        count=count,
        method=method,
        params=pairs(params, option="--param"),
        features=features,
        form=reading.format,
        mapping=reading.map,
        out=out,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    lines = [f"{len(found.rows):,} of {found.figures['pool_rows']:,} rows to label, by {method}: {out}"]
    if found.figures["repeats_left_out"]:
        lines.append(f"left out as repeats: {found.figures['repeats_left_out']:,}")
    lines += _table([row.id for row in found.rows], found.reasons)
    ids = [row.id for row in found.rows]
    session.result(
        {"path": str(out), "method": method, **found.figures, "ids": ids, "log": list(found.log)}, "\n".join(lines)
    )


@command.command()
@click.argument("shots", metavar="SHOTS", type=click.Path(path_type=Path))
@click.option(
    "--method", required=True, metavar="NAME", help="nearest, confusing, search, ease: `xpert methods --kind orderer`."
)
@click.option(
    "--queries",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The prompts to answer (nearest), or rows with answers on which lists are scored (search, ease).",
)
@_count
@_param
@_out
@config_options(FeatureOptions, skip=("clusters",))
@common_options
def order(
    session: Session,
    shots: Path,
    method: str,
    queries: Path | None,
    count: int,
    params: tuple[str, ...],
    out: Path,
    **options: Any,
) -> None:
    """Order K of the labelled SHOTS as exemplars for a prompt.

    FILE.jsonl gets the exemplars in the order of the prompt, the last one next to the question; with `nearest` it gets
    a line per query, its few-shot prompt as `messages`, ready for `xpert run --prompts`. How it was made, and the
    score and log of a search, stand in FILE.manifest.json.
    """
    from xpert.shot_ordering import order_shots

    found = order_shots(
        shots,
        count=count,
        method=method,
        queries=queries,
        params=pairs(params, option="--param"),
        features=take(FeatureOptions, options),
        out=out,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    ids = [[row.id for row in found.exemplars(place)] for place in range(len(found.lists))]
    value: dict[str, Any] = {"path": str(out), "method": method, **found.figures}
    if found.lists[0].query is None:
        value["exemplars"] = ids[0]
        lines = [f"{count} of {len(found.shots):,} shots by {method}, score {found.figures['score']:.4f}: {out}"]
        lines += _table(ids[0], found.lists[0].reasons)
    else:
        value["exemplars"] = {query.id: chosen for query, chosen in zip(found.queries, ids, strict=True)}
        lines = [f"{len(ids):,} prompts with {count} of {len(found.shots):,} shots each, by {method}: {out}"]
        lines.append(f"mean score {found.figures['score']:.4f}")
    session.result(value, "\n".join(lines))


def _table(ids: list[str], reasons: Any) -> list[str]:
    lines = [f"{rank:>5}  {key}  {reason}" for rank, (key, reason) in enumerate(zip(ids, reasons, strict=True), 1)]
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"       and {len(lines) - _SHOWN:,} more"]
