"""`xpert eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.errors import BadInput
from xpert.experts.evaluate import EvalOptions, Evaluation

__all__ = ["choice_line", "command", "score_table"]


@click.command("eval")
@click.argument("subjects", nargs=-1, required=True, metavar="MIXTURE|EXPERT|MODEL...")
@click.option("--suite", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Test items.")
@click.option("--controls", is_flag=True, help="Put base, experts, random and oracle routing beside each mixture.")
@click.option("--registry", "location", metavar="R", help="Where registered names are looked up.")
@click.option("--base", metavar="MODEL", help="Where the experts' base model lies, if not where they say.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML report.")
@config_options(EvalOptions)
@common_options
def command(
    session: Session,
    subjects: tuple[str, ...],
    suite: Path,
    controls: bool,
    location: str | None,
    base: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Score mixtures, experts and models side by side on a suite, per skill and overall.

    Several are ranked in the last column over the skills by Borda points, which do not mix the units of different
    metrics.
    """
    from xpert.data import read_suite
    from xpert.experts.evaluate import usable_items
    from xpert.experts.score_report import write_score_report
    from xpert.experts.subjects import open_entrants, run_entrants
    from xpert.registry.opening import open_registry
    from xpert.storage import check_output

    settings = take(EvalOptions, options)
    if out is not None:
        check_output(out)
    loaded = read_suite(suite, skip_metrics=settings.skip_metric)
    items = usable_items(loaded.items, settings)
    entrants = open_entrants(subjects, open_registry(location) if location is not None else None, base=base)
    if controls and not any(entrant.mixture and len(entrant.mixture.experts) > 1 for entrant in entrants):
        raise BadInput("--controls stand beside mixtures of several experts, and there is none", hint="leave it out")
    found = run_entrants(
        entrants,
        items,
        settings,
        controls=controls,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    if out is not None:
        write_score_report(out, found, title="Scores side by side", lead=f"on the suite {loaded.name}")
    session.result(
        {"suite": loaded.name, "items": len(items), "scores": found.to_dict(), "borda": borda_points(found)},
        "\n\n".join(filter(None, [score_table(found), choice_line(found)])),
    )


def borda_points(found: Evaluation) -> dict[str, float]:
    """Subject -> Borda points over the skills, most first; none for a single subject, which is ranked with nobody."""
    from xpert.registry.ranking import borda

    if len(found.results) < 2:
        return {}
    return borda({skill: {n: found.interval(n, skill).score for n in found.results} for skill in found.skills})


def score_table(found: Evaluation) -> str:
    """A line per subject: overall, each skill, Borda points where there are several. Scores in hundredths."""
    points = borda_points(found)
    width = max(12, *(len(name) for name in found.results))
    columns = [(skill, max(7, len(skill))) for skill in found.skills]
    head = f"{'':<{width}}  {'all items':>18}  " + "  ".join(f"{s:>{w}}" for s, w in columns)
    lines = [head + (f"  {'Borda':>6}" if points else "")]
    for name in found.results:
        overall = found.interval(name)
        shown = f"{100 * overall.score:.1f} [{100 * overall.low:.0f}-{100 * overall.high:.0f}]"
        scores = "  ".join(f"{100 * found.interval(name, skill).score:>{w}.1f}" for skill, w in columns)
        ranked = f"  {points[name]:>6.1f}" if points else ""
        lines.append(f"{name:<{width}}  {shown:>18}  {scores}{ranked}")
    return "\n".join(lines)


def choice_line(found: Evaluation) -> str:
    """Accuracy by likelihood over choices, of every subject; empty where no item has choices."""
    choices = {name: found.choice_interval(name) for name in found.results}
    known = [f"{name} {100 * choice.score:.1f}" for name, choice in choices.items() if choice]
    return f"By likelihood over choices, where there are some: {', '.join(known)}." if known else ""
