"""What the commands of `xpert router` share: the mixture, and the observations of its experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.router_learning.observe_options import ObserveOptions

if TYPE_CHECKING:
    from xpert.experts.mixture import Mixture
    from xpert.experts.router_learning.observations import Observed

__all__ = ["folds_option", "mixture_options", "observation_options", "percent"]

folds_option = click.option(
    "--folds", type=click.IntRange(2), default=5, show_default=True, help="Parts that a router is kept from in turn."
)


def mixture_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds MIXTURE with --registry and --base, and the common options; the mixture comes as `mixture`."""

    @click.argument("mixture", metavar="MIXTURE")
    @click.option(
        "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
    )
    @click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the mixture says.")
    @common_options
    @functools.wraps(command)
    def wrapped(session: Session, mixture: str, location: str | None, base: str | None, **options: Any) -> Any:
        from xpert.experts.mixture_file import load_mixture
        from xpert.registry.opening import open_registry

        loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
        if base is not None:
            loaded = replace(loaded, base=replace(loaded.base, ref=base))
        return command(session, loaded, **options)

    return wrapped


def observation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --on and the options of observing a suite; a function that gives the observations comes as `observed`."""

    @click.option(
        "--on",
        "source",
        required=True,
        metavar="SUITE|OBSERVATIONS",
        help="Of `xpert router observe`, or a suite: it is observed first, once, into the cache.",
    )
    @config_options(ObserveOptions)
    @functools.wraps(command)
    def wrapped(session: Session, mixture: Mixture, source: str, **options: Any) -> Any:
        settings = take(ObserveOptions, options)

        def observed(path: str = source) -> Observed:
            from xpert.experts.router_learning.observing import observed_on

            return observed_on(mixture, path, settings, device=session.device, progress=session.progress)

        return command(session, mixture, observed=observed, **options)

    return wrapped


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
