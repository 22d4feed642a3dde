"""`xpert select`: rows for a task out of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, pairs, take
from xpert.errors import BadInput
from xpert.features import FeatureOptions
from xpert.pool_build import PoolOptions

__all__ = ["command"]


@click.command("select")
@click.argument("pool", metavar="POOL")
@click.option("--shots", metavar="FILE", help="The examples of the task; methods that are anchored need them.")
@click.option(
    "--method",
    default="kshot",
    show_default=True,
    metavar="NAME[,NAME...]",
    help="See `xpert methods`; or a pipeline, FILE.yaml. Several: one report compares them.",
)
@click.option("--budget", required=True, metavar="B", help="How much: rows (1000), a share (5%) or tokens (200ktok).")
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the method; may be repeated. METHOD.KEY=VALUE where several methods are compared.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--executor", default="local", show_default=True, metavar="NAME", help="What runs models over the rows: local, ray."
)
@click.option("--workers", type=int, metavar="N", help="Workers of the executor ray.  [default: one per GPU, or CPU]")
@click.option("--report/--no-report", default=True, show_default=True, help="Write report.html.")
@click.option("--explain", is_flag=True, help="Print why each row was chosen, and the method's log.")
@config_options(FeatureOptions)
@config_options(PoolOptions)
@common_options
def command(
    session: Session,
    pool: str,
    shots: str | None,
    method: str,
    budget: str,
    params: tuple[str, ...],
    out: Path,
    executor: str,
    workers: int | None,
    report: bool,
    explain: bool,
    **options: Any,
) -> None:
    """Selects rows for a task from POOL (a pool folder or any source), best first, and writes them to a folder.

    The folder holds selected.jsonl, the shots, manifest.json and report.html. Rows that overlap the shots are left
    out. The options on reading (--format, --map, ...) apply where POOL is a source, not a pool folder.
    """
    shared: dict[str, Any] = {
        "shots": shots,
        "budget": budget,
        "out": out,
        "features": take(FeatureOptions, options),
        "pool_options": take(PoolOptions, options),
        "seed": session.seed,
        "device": session.device,
        "executor": executor,
        "workers": workers,
        "report": report,
        "progress": session.progress,
    }
    given = pairs(params, option="--param")
    methods = [name.strip() for name in method.split(",")]
    if len(methods) > 1:
        if explain:
            raise BadInput("--explain is of one method", hint="its rows and log lie in the method's own folder")
        _compare(session, pool, methods, given, shared)
        return
    from xpert.selection import select

    found = select(pool, method=method, params=given, **shared)
    figures = dict(found.figures)
    value: dict[str, Any] = {"path": str(found.path), "method": method, **figures}
    lines = [_summary(found.path, method, figures)]
    if explain:
        marks, log = found.marks(), found.log()
        value |= {"chosen": marks, "log": log}
        lines += [f"{mark['rank']:>5}  {mark['score']:.4f}  {mark['id']}  {mark['reason']}" for mark in marks]
        lines += ["  ".join(f"{key} {content}" for key, content in step.items()) for step in log]
    session.result(value, "\n".join(lines))


def _compare(session: Session, pool: str, methods: list[str], params: dict[str, str], shared: dict[str, Any]) -> None:
    from xpert.comparison import compare, split_params

    found = compare(pool, methods, params=split_params(params, methods), **shared)
    names = list(found.selections)
    value = {"path": str(found.path), "methods": dict(found.figures), "overlap": found.overlap.tolist()}
    width = max(map(len, names))
    head = f"{'':<{width}}  {'rows':>7}  {'tokens':>9}  {'to shots':>8}  {'alike':>6}  {'coverage':>8}  {'seconds':>8}"
    lines = [head, *(_compared(name, found.figures[name], width) for name in names), "", "rows in common:"]
    lines += [f"{'':<{width}}  " + "  ".join(f"{name:>8}" for name in names)]
    for name, shares in zip(names, found.overlap, strict=True):
        cells = (f"{share:>{max(8, len(other))}.0%}" for share, other in zip(shares, names, strict=True))
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    session.result(value, "\n".join([*lines, "", str(found.path)]))


def _compared(name: str, figures: Any, width: int) -> str:
    similar, alike = (
        "-" if value is None else f"{value:.3f}" for value in (figures.get("shot_similarity"), figures["alike"])
    )
    seconds = "-" if figures["cpu_seconds"] is None else f"{figures['cpu_seconds']:.2f}"
    return (
        f"{name:<{width}}  {figures['rows']:>7,}  {figures['tokens']:>9,}  {similar:>8}  {alike:>6}"
        f"  {figures['coverage']:>8.3f}  {seconds:>8}"
    )


def _summary(path: Path, method: str, figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['rows']:,} of {figures['pool_rows']:,} rows by {method}: "
        f"{figures['tokens']:,} {figures['tokens_unit']}"
    ]
    if figures["excluded_as_shots"]:
        lines.append(f"left out as overlapping the shots: {figures['excluded_as_shots']:,}")
    if "mean_similarity" in figures:
        lines.append(f"mean cosine to the nearest shot: {figures['mean_similarity']:.3f}")
    for name in ("skills", "licences"):
        counts = figures[name]
        if set(counts) != {"unknown"}:
            shown = ", ".join(f"{key} {count:,}" for key, count in list(counts.items())[:8])
            more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
            lines.append(f"{name}: {shown}{more}")
    return "\n".join([*lines, str(path)])
