"""`xpert router eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpert.commands.options import Session
from xpert.commands.router._shared import folds_option, mixture_options, observation_options

if TYPE_CHECKING:
    from xpert.experts.mixture import Mixture
    from xpert.experts.router_learning.evaluating import RouterEvaluation, RouterFigures
    from xpert.experts.router_learning.observations import Observed

__all__ = ["command", "router_table"]

_SHOWN = 10
"""Points of a front that are printed; --json and the page have them all."""


@click.command("eval")
@click.option(
    "--router",
    "routers",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="Another router in place of the mixture's; may be repeated.",
)
@click.option(
    "--held-out",
    metavar="SUITE|OBSERVATIONS",
    help="Measure on these prompts; routers that learn are trained on all of --on.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML report.")
@folds_option
@mixture_options
@observation_options
def command(
    session: Session,
    mixture: Mixture,
    observed: Callable[..., Observed],
    routers: tuple[str, ...],
    held_out: str | None,
    out: Path | None,
    folds: int,
) -> None:
    """Measure MIXTURE's router, and others in its place, against the oracle on observed prompts.

    The oracle takes the subject that answered best, prompt by prompt. A router that learns is trained anew on parts of
    the prompts and measured on those left out, unless it was trained on others or --held-out names others. Of several
    experts with weights, the heaviest one's answer counts.
    """
    from xpert.experts.router_learning.evaluating import RouterChoice, evaluate_routers
    from xpert.experts.router_learning.report import write_router_report
    from xpert.storage import check_output

    choices = [RouterChoice.parse(text) for text in routers]
    if out is not None:
        check_output(out)
    seen = observed()
    found = evaluate_routers(
        mixture,
        seen,
        choices,
        held_out=observed(held_out) if held_out is not None else None,
        folds=folds,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    if out is not None:
        write_router_report(out, found)
    session.result({"observations": str(seen.folder), **found.to_dict()}, "\n".join(_lines(found)))


def router_table(found: RouterEvaluation) -> list[str]:
    """A line per router and control. Scores, shares and regret in hundredths."""
    every = [*found.routers, *found.controls]
    width = max(len(one.name) for one in every)
    head = (
        f"{'':<{width}}  {'score':>18}  {'as oracle':>9}  {'matters':>7}  {'regret':>18}  {'base':>5}  "
        f"{'answers':>7}  {'Mparam':>7}  {'ms':>6}  measured"
    )
    return [head, *(_line(one, width) for one in every)]


def _line(one: RouterFigures, width: int) -> str:
    score = f"{100 * one.score.score:.1f} [{100 * one.score.low:.1f}-{100 * one.score.high:.1f}]"
    regret = f"{100 * one.regret.score:.1f} [{100 * one.regret.low:.1f}-{100 * one.regret.high:.1f}]"
    matters = f"{100 * one.where_it_matters:.1f}" if one.where_it_matters is not None else "-"
    size = f"{one.parameters:.2f}" if one.parameters is not None else "-"
    spent = f"{one.milliseconds:.2f}" if one.milliseconds is not None else "-"
    return (
        f"{one.name:<{width}}  {score:>18}  {100 * one.accuracy:>9.1f}  {matters:>7}  {regret:>18}  "
        f"{100 * one.to_base:>5.1f}  {one.answers:>7.2f}  {size:>7}  {spent:>6}  {one.how}"
    )


def _lines(found: RouterEvaluation) -> list[str]:
    """The table, what chances and second stages did, and of a single router its curves."""
    lines = [
        f"{found.oracle.n:,} prompts of {found.suite}, {found.differing:,} on which subjects differ; in hundredths, "
        "with 95 % intervals:",
        "",
    ]
    lines += [*router_table(found), ""]
    for one in found.routers:
        if one.escalated:
            lines.append(f"{one.name}: the second stage answered {100 * one.escalated:.1f} %")
        if one.chances is not None:
            lines.append(_chances(one))
    if len(found.routers) > 1:
        return [*lines, "Reliability, the curves of a reject option and fronts of each: -o REPORT.html, or --json."]
    one = found.routers[0]
    if one.chances is not None:
        lines += _reliability(one)
    if one.risk is not None:
        lines += [*([""] if lines[-1] else []), *_risk(one)]
    if one.front:
        lines += ["", f"{one.name}: quality against cost, what is not dominated"]
        step = -(-len(one.front) // _SHOWN)
        for point in one.front[::step]:
            lines.append("  " + ", ".join(f"{key} {_plain(value)}" for key, value in point.items()))
    return lines


def _chances(one: RouterFigures) -> str:
    chances = one.chances
    assert chances is not None
    seen = ", the very ones it was calibrated on" if chances.in_sample else ""
    return f"{one.name}: its chances are off by {chances.error:.3f} on average ({chances.n:,} prompts{seen})"


def _reliability(one: RouterFigures) -> list[str]:
    chances = one.chances
    assert chances is not None
    lines = [f"  {'chance':>10}  {'prompts':>7}  {'mean chance':>11}  {'mean score':>10}"]
    for part in chances.bins:
        span = f"{part.low:.1f}-{part.high:.1f}"
        lines.append(f"  {span:>10}  {part.n:>7,}  {part.chance:>11.2f}  {part.score:>10.2f}")
    return lines


def _risk(one: RouterFigures) -> list[str]:
    risk = one.risk
    assert risk is not None
    lines = [f"{one.name}: accepting its surest routes only (area {risk.area:.3f})"]
    lines.append(f"  {'accepted':>8}  {'their score':>11}  {'all, base for the rest':>22}  {'score from':>10}")
    points = list(zip(risk.coverage, risk.accepted, risk.with_base, risk.below, strict=True))
    step = max(1, len(points) // 6)
    shown = points[::-1][::step][::-1]
    lines += [f"  {100 * c:>7.0f}%  {100 * a:>11.1f}  {100 * w:>22.1f}  {b:>10.3g}" for c, a, w, b in shown]
    return lines


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
