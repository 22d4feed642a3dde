"""`xpert profile`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.evaluate import EvalOptions
from xpert.registry.card import ExpertCard, Interval

__all__ = ["command"]


@click.command("profile")
@click.argument("expert", type=click.Path(path_type=Path), metavar="EXPERT")
@click.option("--suite", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Test items.")
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the expert says.")
@config_options(EvalOptions)
@common_options
def command(session: Session, expert: Path, suite: Path, base: str | None, **options: Any) -> None:
    """Score an expert and its base per skill, and write the profile into its card.

    Beside the scores of generated answers, items with choices are also scored by which choice is likeliest, since
    learning the answer's format is not a skill.
    """
    from xpert.data import read_suite
    from xpert.experts.expert_report import REPORT_FILE
    from xpert.experts.profiles import profile_expert

    settings = take(EvalOptions, options)
    ExpertCard.read(expert)
    items = read_suite(suite, skip_metrics=settings.skip_metric)
    profile, _ = profile_expert(
        expert,
        list(items),
        suite=items.name,
        suite_fingerprint=items.fingerprint,
        options=settings,
        base=base,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    lines = [f"{'skill':<28} {'metric':<10} {'n':>5}  {'base':>18}  {'expert':>18}"]
    for skill, score in profile.skills.items():
        lines.append(
            f"{skill:<28} {score.metric:<10} {score.expert.n:>5}  {_shown(score.base):>18}  {_shown(score.expert):>18}"
        )
        if score.expert_choice and score.base_choice:
            base, own = _shown(score.base_choice), _shown(score.expert_choice)
            lines.append(
                f"{'  by likelihood of choices':<28} {'':<10} {score.expert_choice.n:>5}  {base:>18}  {own:>18}"
            )
    lines += ["", f"written into {expert / 'expert.json'} and {expert / REPORT_FILE}"]
    session.result({"expert": str(expert), "profile": asdict(profile)}, "\n".join(lines))


def _shown(interval: Interval) -> str:
    return f"{100 * interval.score:.1f} [{100 * interval.low:.0f}-{100 * interval.high:.0f}]"
