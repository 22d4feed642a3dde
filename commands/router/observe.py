"""`xpert router observe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, config_options, take
from xpert.commands.router._shared import mixture_options
from xpert.experts.router_learning.observe_options import ObserveOptions

if TYPE_CHECKING:
    from xpert.experts.mixture import Mixture
    from xpert.experts.router_learning.observations import Observed

__all__ = ["command"]


@click.command("observe")
@click.option("--on", "suite", required=True, metavar="SUITE", help="Test items; their skills are the categories.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The observations.")
@config_options(ObserveOptions)
@mixture_options
def command(session: Session, mixture: Mixture, suite: str, out: Path, **options: Any) -> None:
    """Let every expert of MIXTURE and the base answer a suite once, in mixed batches.

    DIR gets a line per item in observations.jsonl: what each answered, the score it earned, its confidence, and its
    loss on the reference answer. Experts answer alone, without the mixture's gate. Stopped, the same command goes on.
    """
    from xpert.experts.router_learning.observing import observe

    found = observe(
        mixture, suite, out, take(ObserveOptions, options), device=session.device, progress=session.progress
    )
    session.result(
        {"observations": str(out), "suite": found.suite, "subjects": found.observations.subjects, **found.figures},
        _text(out, found),
    )


def _text(out: Path, found: Observed) -> str:
    scores = found.figures["scores"]
    width = max(len(name) for name in scores)
    lines = [f"{out}: {len(found):,} items of {found.suite}, answered by {len(scores)} subjects; mean scores:"]
    lines += [f"  {name:<{width}}  {100 * score:5.1f}" for name, score in scores.items()]
    lines.append(f"  the best of each item {100 * found.figures['best_per_item']:.1f}")
    return "\n".join(lines)
