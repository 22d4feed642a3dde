"""`xpert router train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpert.commands.options import Session, pairs
from xpert.commands.router._shared import folds_option, mixture_options, observation_options, percent

if TYPE_CHECKING:
    from xpert.experts.mixture import Mixture
    from xpert.experts.router_learning.observations import Observed

__all__ = ["command"]


@click.command("train")
@click.option("--router", required=True, metavar="NAME", help="One that learns: `xpert methods --kind router`.")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of it; may be repeated.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The new mixture.")
@folds_option
@mixture_options
@observation_options
def command(
    session: Session,
    mixture: Mixture,
    observed: Callable[[], Observed],
    router: str,
    params: tuple[str, ...],
    out: Path,
    folds: int,
) -> None:
    """Train a router that learns, for MIXTURE, and write the mixture with it.

    What it has learned lies beside FILE, in a .safetensors file. The figures printed are of prompts left out of its
    training, fold by fold. A calibration of MIXTURE is left out, since it was another router's.
    """
    from xpert.experts.router_learning.training import check_trainable, train_router

    given = pairs(params, option="--param")
    check_trainable(router, given, out)
    trained = train_router(
        mixture,
        observed(),
        router,
        given,
        out,
        folds=folds,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    figures = trained.figures
    text = [
        f"{out}: {len(trained.mixture.experts)} experts behind router {router}, trained on {trained.items:,} items of "
        f"{trained.observed}",
        f"what it has learned: {trained.state_file}",
        f"on prompts left out, {figures.how}: score {100 * figures.score.score:.1f} of the oracle's "
        f"{100 * trained.oracle.score:.1f}, regret {100 * figures.regret.score:.1f} "
        f"[{100 * figures.regret.low:.1f}-{100 * figures.regret.high:.1f}], as good as the best answer on "
        f"{percent(figures.accuracy)}, base {percent(figures.to_base)}",
    ]
    session.result(
        {
            "mixture": str(out),
            "router_state": str(trained.state_file),
            "observations": str(trained.observed),
            "oracle": vars(trained.oracle),
            **figures.to_dict(),
        },
        "\n".join(text),
    )
