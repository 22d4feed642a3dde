"""`xpert registry rank`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, config_options, pairs, take
from xpert.commands.registry._shared import registry_options
from xpert.errors import BadInput
from xpert.registry.ranking.leaderboard import RankOptions, leaderboard, rank_contests
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME[@VERSION]...]")
@click.option(
    "--base", metavar="MODEL", help="Experts of this base model (its reference, the last part of it, or fingerprint)."
)
@click.option(
    "--pairs",
    "pair_file",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help='Rank by contests instead of profiles: {"winner", "loser"} or {"a", "b", "result": "a|b|tie"} a row.',
)
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help='{"OWNER/NAME": seconds}, instead of what the profiles say.',
)
@config_options(RankOptions)
@registry_options
def command(
    session: Session,
    registry: Registry,
    names: Sequence[str],
    base: str | None,
    pair_file: Path | None,
    latency: Path | None,
    **settings: Any,
) -> None:
    """Rank experts by their skill profiles, or by who beat whom.

    Without names: the latest version of every profiled expert of one base model. Tasks are the skills of the profiles'
    suites; equal skills of different suites are different tasks.
    """
    from xpert.commands.registry._rankings import contests_shown, leaderboard_shown
    from xpert.registry.ranking.contests import read_contests
    from xpert.registry.ranking.entrants import experts_to_rank
    from xpert.registry.ranking.pareto import read_latencies

    by_hand = click.get_current_context().get_parameter_source("method") != click.core.ParameterSource.DEFAULT
    if pair_file is not None and not by_hand:
        settings["method"] = "bradley-terry"
    options = take(RankOptions, settings)
    weights = _weights(options.weigh)
    if pair_file is not None:
        _check_pairs(names, options, base=base, latency=latency)
        contests = read_contests(pair_file)
        ranking = rank_contests(contests, options, seed=session.seed)
        session.result({"pairs": str(pair_file), **ranking.to_dict()}, contests_shown(contests, ranking))
        return
    latencies = None if latency is None else read_latencies(latency)
    details = experts_to_rank(registry, names, base=base)
    found = leaderboard(details, options, weights=weights, latencies=latencies, seed=session.seed)
    session.result(found.to_dict(), leaderboard_shown(found))


def _weights(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for cost, value in pairs(given, option="--weigh").items():
        try:
            weights[cost] = float(value)
        except ValueError:
            raise BadInput(f"--weigh {cost}={value}: not a number") from None
    return weights


def _check_pairs(names: Sequence[str], options: RankOptions, **others: object) -> None:
    """Refuses what has no meaning beside --pairs."""
    if options.method != "bradley-terry":
        raise BadInput("pairs are ranked by bradley-terry alone", hint="leave --method out")
    given = {**others, "pareto": options.pareto, "weigh": options.weigh, "skills": options.skills}
    given |= {"over": options.over != "expert", "choice-scores": options.choice_scores}
    given |= {"draw-scores": options.draw_scores}
    useless = next((f"--{name}" for name, value in given.items() if value), "a NAME" if names else None)
    if useless:
        raise BadInput(f"{useless} has no meaning beside --pairs, which ranks what the file names")
