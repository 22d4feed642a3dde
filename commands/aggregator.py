"""`xpert aggregator choose`: who of a mixture should read the others' replies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.errors import BadInput
from xpert.experts.evaluate import EvalOptions

if TYPE_CHECKING:
    from xpert.experts.aggregator_choice import ChosenAggregator

__all__ = ["command"]


@click.group()
def command() -> None:
    """Choose who of a mixture reads the replies of the others."""


@command.command()
@click.argument("mixture", metavar="MIXTURE")
@click.option(
    "--on", "suite", type=click.Path(path_type=Path), required=True, metavar="SUITE", help="Items with answers."
)
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the mixture says.")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="mixture.json"
)
@config_options(EvalOptions)
@common_options
def choose(
    session: Session, mixture: str, suite: Path, location: str | None, base: str | None, out: Path, **options: Any
) -> None:
    """Find the expert, or the base, that aggregates best, and write the mixture with it as its aggregator.

    For each item of the suite that somebody answers rightly, every candidate reads one right and two wrong replies,
    shuffled, and writes the answer. The best mean score wins.
    """
    from dataclasses import replace

    from xpert.data import read_suite
    from xpert.experts.aggregator_choice import choose_aggregator
    from xpert.experts.mixture_file import load_mixture, write_mixture
    from xpert.registry.opening import open_registry
    from xpert.storage import check_output

    if out.is_dir():
        raise BadInput("is a folder; a mixture is a file", where=str(out), hint="write -o FOLDER/mixture.json")
    check_output(out)
    settings = take(EvalOptions, options)
    items = read_suite(suite, skip_metrics=settings.skip_metric).items
    loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
    if base is not None:
        loaded = replace(loaded, base=replace(loaded.base, ref=base))
    found = choose_aggregator(
        replace(loaded, name=out.stem),
        items,
        settings,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    write_mixture(out, found.mixture)
    session.result({"mixture": str(out), **found.to_dict()}, _text(out, found))


def _text(out: Path, found: ChosenAggregator) -> str:
    width = max(len(key) for key in found.scores)
    lines = [
        f"  {key:<{width}}  {100 * one.score:5.1f} [{100 * one.low:.0f}-{100 * one.high:.0f}]"
        for key, one in found.scores.items()
    ]
    left_out = f"; {found.skipped:,} items without a right or a wrong reply are left out" if found.skipped else ""
    return "\n".join([f"{out}: {found.best} aggregates, by {found.trials:,} trials{left_out}", *lines])
