"""`xpert profile`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.evaluate import EvalOptions
from xpert.experts.profile_options import ProfileOptions
from xpert.registry.card import ExpertCard, Interval, SkillProfile, SkillScore

__all__ = ["command"]

SHOWN = 12


@click.command("profile")
@click.argument("expert", type=click.Path(path_type=Path), metavar="EXPERT")
@click.option("--suite", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Test items.")
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the expert says.")
@config_options(ProfileOptions)
@config_options(EvalOptions)
@common_options
def command(session: Session, expert: Path, suite: Path, base: str | None, **options: Any) -> None:
    """Score an expert and its base per skill, cluster and keyword, and write the profile into its card.

    Beside the scores of generated answers, items with choices are also scored by which choice is likeliest, since
    learning the answer's format is not a skill. Where items share a `probe`, it is told how evenly they are answered.
    """
    from xpert.data import read_suite
    from xpert.experts.expert_report import REPORT_FILE
    from xpert.experts.profiles import profile_expert

    settings, grouping = take(EvalOptions, options), take(ProfileOptions, options)
    ExpertCard.read(expert)
    items = read_suite(suite, skip_metrics=settings.skip_metric)
    made = profile_expert(
        expert,
        list(items),
        suite=items.name,
        suite_fingerprint=items.fingerprint,
        options=settings,
        grouping=grouping,
        base=base,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    lines = [*_shown(made.profile), "", *made.notes]
    lines += [f"written into {expert / 'expert.json'} and {expert / REPORT_FILE}"]
    value = {"expert": str(expert), "profile": asdict(made.profile), "notes": list(made.notes)}
    session.result(value, "\n".join(lines))


def _shown(profile: SkillProfile) -> Iterator[str]:
    yield _head("skill")
    for skill, score in profile.skills.items():
        yield _line(skill, score)
        if score.expert_choice and score.base_choice:
            yield _pair("  by likelihood of choices", "", score.base_choice, score.expert_choice)
        if score.consistency and score.base_consistency:
            own, base = score.consistency, score.base_consistency
            yield _pair("  related items all right", "", base.all_right, own.all_right)
            yield _pair("  related items agree", "", base.agreement, own.agreement)
    yield from _groups("cluster", profile.clusters)
    yield from _groups("keyword", profile.keywords)


def _groups(kind: str, scores: Mapping[str, SkillScore]) -> Iterator[str]:
    if not scores:
        return
    yield ""
    yield _head(kind)
    largest = sorted(scores.items(), key=lambda entry: (-entry[1].expert.n, entry[0]))
    for name, score in largest[:SHOWN]:
        yield _line(name, score)
    if len(largest) > SHOWN:
        yield f"and {len(largest) - SHOWN:,} smaller ones, in the card and the report"


def _head(kind: str) -> str:
    return f"{kind:<34} {'metric':<10} {'n':>5}  {'base':>18}  {'expert':>18}"


def _line(name: str, score: SkillScore) -> str:
    return _pair(name, score.metric, score.base, score.expert)


def _pair(name: str, metric: str, base: Interval, own: Interval) -> str:
    shown = name if len(name) <= 34 else f"{name[:33]}…"
    return f"{shown:<34} {metric:<10} {own.n:>5}  {_interval(base):>18}  {_interval(own):>18}"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.score:.1f} [{100 * interval.low:.0f}-{100 * interval.high:.0f}]"
