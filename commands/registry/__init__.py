"""`xpert registry`: one command a file, over one `Registry`."""

from __future__ import annotations

import click

from xpert.commands.lazy import LazyCommands

__all__ = ["COMMANDS", "command"]

# name -> (module, help), in the order of a version's life.
COMMANDS: dict[str, tuple[str, str]] = {
    "publish": ("publish", "File an expert folder or a mixture as the next version of a name."),
    "pull": ("pull", "Copy a version out, every file checked."),
    "list": ("list_names", "List all names with their latest version."),
    "show": ("show", "Show a version's card, skill profile and files."),
    "search": ("search", "Search names, descriptions and skills."),
    "verify": ("verify", "Read every file and check it."),
    "remove": ("remove", "Remove a version, or a name with all its versions."),
    "schema": ("schema", "Print the form of an expert's card."),
    "gc": ("collect", "Remove files that no version needs."),
}


@click.group(
    cls=LazyCommands,
    table=COMMANDS,
    package="xpert.commands.registry",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Publish, list, show, pull and verify experts and mixtures.

    NAME is OWNER/NAME; a version is asked for as OWNER/NAME@3, and is the latest where none is given.
    """
