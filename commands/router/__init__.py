"""`xpert router`: routers that learn from what experts answer, and how good any router is; one command a file."""

from __future__ import annotations

import click

from xpert.commands.lazy import LazyCommands

__all__ = ["COMMANDS", "command"]

# name -> (module, help), in the order in which they are used.
COMMANDS: dict[str, tuple[str, str]] = {
    "observe": ("observe", "Let every expert and the base answer a suite once."),
    "train": ("train", "Train a router that learns, for a mixture."),
    "eval": ("evaluation", "Measure routers against the oracle."),
    "calibrate": ("calibrate", "Turn a router's scores into chances, and say when the base answers."),
}


@click.group(
    cls=LazyCommands,
    table=COMMANDS,
    package="xpert.commands.router",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Observe a mixture's experts; train, measure and calibrate its router.

    MIXTURE is a file, OWNER/NAME[@VERSION] of a registry, or an expert folder. Routers are compared on observations:
    every expert answers a suite once, and nothing is generated after that.
    """
