"""`xpert merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options, pairs
from xpert.errors import BadInput

if TYPE_CHECKING:
    from xpert.experts.merging import MergeResult

__all__ = ["command"]


@click.command("merge")
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT[=WEIGHT]...|MIXTURE")
@click.option(
    "--method",
    default="concat",
    show_default=True,
    metavar="NAME[,NAME...]",
    help="See `xpert methods --kind merger`; several are compared and none is written.",
)
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the method; repeatable.")
@click.option("--rank", type=click.IntRange(1), help="Largest rank of a merged module. [default: the method's own]")
@click.option("--shots", type=click.Path(path_type=Path), metavar="FILE", help="What lorahub fits the weights to.")
@click.option(
    "--usage",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `xpert route` or `xpert run` wrote: how much each expert is used, for grouped.",
)
@click.option("--registry", "location", metavar="R", help="Where registered experts are looked up.")
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the experts say.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), metavar="DIR", help="The merged expert.")
@common_options
def command(
    session: Session,
    experts: tuple[str, ...],
    method: str,
    params: tuple[str, ...],
    rank: int | None,
    shots: Path | None,
    usage: Path | None,
    location: str | None,
    base: str | None,
    out: Path | None,
) -> None:
    """Merge weighted experts of one base into one adapter that plain peft loads, or into a smaller pool.

    Tells each method's relative error against the exact weighted sum of the changes. Without -o nothing is written.
    Without any WEIGHT, all weights are equal (or the mixture's) and sum to one.
    """
    from xpert.experts.merge_runs import compare, run_merge
    from xpert.experts.merge_sources import read_sources
    from xpert.registry.opening import open_registry

    methods = [name.strip() for name in method.split(",") if name.strip()]
    if out is not None and len(methods) > 1:
        raise BadInput("several methods are compared, not written", hint="leave out -o, or name one method")
    sources = read_sources(experts, open_registry(location) if location is not None else None)
    given: dict[str, Any] = {
        "rank": rank,
        "shots": shots,
        "usage": usage,
        "base": base,
        "seed": session.seed,
        "device": session.device,
        "progress": session.progress,
    }
    values = pairs(params, option="--param")
    if out is None:
        found, refused = compare(sources, methods, values, **given)
    else:
        found, refused = run_merge(sources, methods[0] if methods else method, values, out=out, **given), {}
    written = [f"written to {out}"] if out is not None else []
    session.result(
        {"output": str(out) if out else None, "merges": [r.summary() for r in found], "refused": refused},
        "\n".join([_table(found), *(f"{name}: {why}" for name, why in refused.items()), *written]),
    )


def _table(results: list[MergeResult]) -> str:
    """A line per merged adapter."""
    width = max(6, *(len(result.method) for result in results))
    lines = [f"{'method':<{width}}  {'error':>9}  {'worst':>9}  {'rank':>5}  {'numbers':>12}  {'CPU s':>7}  weights"]
    for result in results:
        weights = " ".join(f"{key}={weight:.4g}" for key, weight in result.weights().items())
        total = result.error.total
        error = "undefined" if total is None else f"{total:.2e}"
        lines.append(
            f"{result.method:<{width}}  {error:>9}  {result.error.worst[1]:>9.2e}  {result.rank:>5}  "
            f"{result.parameters:>12,}  {result.seconds:>7.2f}  {weights}"
        )
    return "\n".join(lines)
