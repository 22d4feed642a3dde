"""`xpert router calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, config_options, take
from xpert.commands.router._shared import folds_option, mixture_options, observation_options, percent
from xpert.errors import BadInput
from xpert.experts.router_learning.calibrating import CalibrateOptions

if TYPE_CHECKING:
    from xpert.experts.calibration import Calibration
    from xpert.experts.mixture import Mixture
    from xpert.experts.router_learning.observations import Observed

__all__ = ["command"]


@click.command("calibrate")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The new mixture.")
@config_options(CalibrateOptions)
@folds_option
@mixture_options
@observation_options
def command(
    session: Session, mixture: Mixture, observed: Callable[[], Observed], out: Path, folds: int, **options: Any
) -> None:
    """Turn the scores of MIXTURE's router into chances, and say below which score the base answers.

    The chance of a route is what its expert's answer is expected to earn: where answers are right or wrong, how likely
    it is right. The error printed is of prompts left out of the curve's making.
    """
    from xpert.experts.router_learning.calibrating import calibrate
    from xpert.storage import check_output

    settings = take(CalibrateOptions, options)
    if out.is_dir():
        raise BadInput("is a folder; a mixture is a file", where=str(out), hint="write -o FOLDER/mixture.json")
    check_output(out)
    seen = observed()
    made = calibrate(
        mixture,
        seen,
        out,
        settings,
        folds=folds,
        seed=session.seed,
        device=session.device,
        progress=session.progress,
    )
    calibration = made.calibration
    assert calibration is not None
    value = {"mixture": str(out), "observations": str(seen.folder), **calibration.to_dict()}
    session.result(value, _text(out, calibration))


def _text(out: Path, calibration: Calibration) -> str:
    told = calibration.figures
    lines = [
        f"{out}: router {told['router']} calibrated on {told['n']:,} of {told['items']:,} prompts of {told['suite']}",
        f"error of its chances on prompts left out: {told['ece_after']:.3f} "
        f"(of its scores taken as chances: {told['ece_before']:.3f})",
        "score -> chance: "
        + ", ".join(f"{s:.3g} -> {c:.2f}" for s, c in zip(calibration.scores, calibration.chances, strict=True)),
    ]
    if calibration.reject_below is None:
        lines.append(f"no bound: the base answers {percent(told['base_share'])}, as the router says")
    else:
        lines.append(
            f"below {calibration.reject_below:.4g} the base answers: {percent(told['base_share'])} of the prompts, "
            f"{percent(told['base_share_before'])} without the bound; score {100 * told['score_before']:.1f} -> "
            f"{100 * told['score']:.1f}"
        )
    if "gain_left_out" in told:
        lines.append(f"gained a prompt by such bounds, on prompts left out: {100 * told['gain_left_out']:+.2f}")
    return "\n".join(lines)
