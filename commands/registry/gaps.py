"""`xpert registry gaps`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.commands.registry._shared import table
from xpert.experts.gaps.options import GapOptions

if TYPE_CHECKING:
    from xpert.experts.gaps.finding import Gap
    from xpert.experts.gaps.report import GapsReport

__all__ = ["command"]

_DAYS = 14
_GAPS = 15
_EXAMPLE = 60


@click.command()
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="LOG...")
@click.option(
    "--registry",
    "location",
    metavar="URL",
    help="Where to look for experts that fill a gap.  [default: $XPERT_REGISTRY, or the user's data folder]",
)
@click.option("--mixture", metavar="M", help="Only requests to this mixture; also finds pilots for its experts.")
@click.option(
    "--taxonomy", metavar="FILE", help="A taxonomy of skills.  [default: $XPERT_TAXONOMY, or the built-in one]"
)
@config_options(GapOptions)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write shots and pilots there.")
@common_options
def command(
    session: Session,
    logs: tuple[Path, ...],
    location: str | None,
    mixture: str | None,
    taxonomy: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Say how experts are used and name the next one to build, by what `xpert serve --request-log` kept.

    LOG: files or folders (.jsonl, .jsonl.gz, .jsonl.zst). Prompts that fell back to the base model are clustered; a
    gap's priority is its share of the traffic times its lack of fit. With -o, each gap's prompts are written as shots
    for `xpert select`, and each expert's pilots for `xpert prototypes --pilots`.
    """
    from xpert.experts.gaps.reading import read_requests
    from xpert.experts.gaps.report import gaps_report, write_gaps
    from xpert.experts.mixture_file import load_mixture
    from xpert.registry.opening import open_registry
    from xpert.registry.skills.taxonomy import Taxonomy
    from xpert.storage import check_output

    settings, known = take(GapOptions, options), Taxonomy.open(taxonomy)
    if out is not None:
        check_output(out)
    registry = open_registry(location)
    served = load_mixture(mixture, registry if location is not None else None) if mixture is not None else None
    report = gaps_report(
        read_requests(logs, progress=session.progress),
        settings,
        mixture=served,
        registry=registry,
        taxonomy=known,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    if out is not None:
        write_gaps(out, report)
    written = {"path": str(out)} if out is not None else {}
    session.result({**report.to_dict(), **written}, lambda: "\n".join(_shown(report, out)))


def _shown(report: GapsReport, out: Path | None) -> list[str]:
    usage, found = report.usage, report.found
    share = usage.fell_back / usage.routed if usage.routed else 0.0
    files = report.requests.files
    lines = [
        f"{usage.requests:,} requests in {files:,} file{'' if files == 1 else 's'}; of {usage.routed:,} routed ones "
        f"{usage.fell_back:,} fell back to the base model ({share:.1%})"
    ]
    if report.requests.torn:
        lines.append(f"{report.requests.torn:,} files end in a torn line, which is passed over")
    if report.others:
        lines.append(f"left out: {report.others:,} requests to other mixtures")
    if usage.experts:
        lines += ["", _experts(report)]
    if len(usage.days) > 1:
        rows = [(day.day, f"{day.routed:,}", f"{day.fell_back:,}") for day in usage.days[-_DAYS:]]
        lines += ["", table(("DAY", "ROUTED", "FELL BACK"), rows)]
    lines.append("")
    if found.gaps:
        lines.append(_gaps(found.gaps[:_GAPS]))
        if len(found.gaps) > _GAPS:
            lines.append(f"and {len(found.gaps) - _GAPS:,} more, which --json and gaps.json hold")
        lines.append("")
    if found.withheld:
        lines.append(
            f"{found.withheld:,} unserved requests lie in clusters of fewer than {report.options.min_prompts} prompts, "
            "which are not told of"
        )
    lines += [*_next(report, out), *_pilots(report)]
    return lines if out is None else [*lines, str(out)]


def _experts(report: GapsReport) -> str:
    rows = [
        (
            *(one.expert, f"{one.requests:,}", f"{one.share:.1%}", f"{one.tokens:,}"),
            *("-" if one.chance is None else f"{one.chance:.2f}", f"{one.asked:,}"),
        )
        for one in report.usage.experts
    ]
    return table(("EXPERT", "REQUESTS", "WEIGHT", "TOKENS", "CHANCE", "BY NAME"), rows)


def _gaps(gaps: Sequence[Gap]) -> str:
    rows = []
    for rank, gap in enumerate(gaps, 1):
        expert, skill = gap.nearest_expert, gap.skill
        rows.append(
            (
                *(str(rank), gap.slug, f"{gap.prompts:,}", f"{gap.requests:,}", f"{gap.share:.1%}"),
                *(f"{gap.lack:.2f}", f"{gap.priority:.4f}"),
                "-" if expert is None else f"{expert[0]} {expert[1]:.2f}",
                "-" if skill is None else f"{skill[0]} {skill[1]:.0%}",
                _short(gap.chosen[0].text),
            )
        )
    head = ("", "GAP", "PROMPTS", "REQUESTS", "TRAFFIC", "LACK", "PRIORITY", "NEAREST EXPERT", "SKILL", "SUCH AS")
    return table(head, rows)


def _next(report: GapsReport, out: Path | None) -> list[str]:
    from xpert.experts.gaps.report import shots_file

    gap = report.next
    if gap is None:
        return ["no gap: every routed prompt is served" if not report.found.unserved else "no gap to tell of"]
    lines = [f"next expert to build: {gap.slug} ({', '.join(gap.terms[:5])})"]
    if gap.holders:
        skill = gap.skill[0] if gap.skill else gap.slug
        lines.append(f"  first try to mix in what the registry has of {skill}: {', '.join(gap.holders)}")
    if out is None:
        lines.append("  with -o DIR its prompts are written as shots, and then")
    shots = (out or Path("DIR")) / shots_file(gap)
    return [*lines, f"  xpert select POOL --shots {shots} --budget 1000 -o SELECTION"]


def _pilots(report: GapsReport) -> list[str]:
    if report.pilots:
        counts = ", ".join(f"{key} {len(pilots)}" for key, pilots in report.pilots.items())
        return [f"pilots (served well, far from the exemplars): {counts}"]
    if report.mixture is not None and report.options.pilots and report.without_chance:
        count = f"{report.without_chance:,} served requests have no chance"
        return [f"no pilots: {count}, which `xpert router calibrate` gives"]
    return []


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _EXAMPLE else words[: _EXAMPLE - 3].rstrip() + "..."
