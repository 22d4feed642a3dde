"""`xpert select`: rows for a task out of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, pairs, take
from xpert.features import FeatureOptions
from xpert.pool_build import PoolOptions

__all__ = ["command"]


@click.command("select")
@click.argument("pool", metavar="POOL")
@click.option("--shots", metavar="FILE", help="The examples of the task; methods that are anchored need them.")
@click.option("--method", default="kshot", show_default=True, metavar="NAME", help="See `xpert methods`.")
@click.option("--budget", required=True, metavar="B", help="How much: rows (1000), a share (5%) or tokens (200ktok).")
@click.option(
    "-p", "--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the method; may be repeated."
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
    from xpert.selection import select

    feature_options, pool_options = take(FeatureOptions, options), take(PoolOptions, options)
    found = select(
        pool,
        shots=shots,
        method=method,
        budget=budget,
        params=pairs(params, option="--param"),
        out=out,
        features=feature_options,
        pool_options=pool_options,
        seed=session.seed,
        device=session.device,
        executor=executor,
        workers=workers,
        report=report,
        progress=session.progress,
    )
    figures = dict(found.figures)
    value: dict[str, Any] = {"path": str(found.path), "method": method, **figures}
    lines = [_summary(found.path, method, figures)]
    if explain:
        marks, log = found.marks(), found.log()
        value |= {"chosen": marks, "log": log}
        lines += [f"{mark['rank']:>5}  {mark['score']:.4f}  {mark['id']}  {mark['reason']}" for mark in marks]
        lines += ["  ".join(f"{key} {content}" for key, content in step.items()) for step in log]
    session.result(value, "\n".join(lines))


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
