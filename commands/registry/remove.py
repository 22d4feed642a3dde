"""`xpert registry remove`."""

from __future__ import annotations

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.names import url_scheme
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.option("--force", is_flag=True, help="Even if a mixture refers to it.")
@registry_options
def command(session: Session, registry: Registry, ref: str, force: bool) -> None:
    """Remove a version, or a name with all its versions; their numbers are not given out again."""
    gone = [version.ref for version in registry.remove(ref, force=force)]
    hub = url_scheme(registry.location) == "hf"
    what_stays = "the Hub keeps its files in earlier commits" if hub else "`xpert registry gc` frees the space"
    session.result({"removed": gone}, f"removed {', '.join(gone)}; {what_stays}")
