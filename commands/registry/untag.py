"""`xpert registry untag`."""

from __future__ import annotations

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("tag", metavar="TAG")
@registry_options
def command(session: Session, registry: Registry, name: str, tag: str) -> None:
    """Take a tag away from a name; without its tag, `latest` follows the newest version again."""
    registry.untag(name, tag)
    session.result({"name": name, "tag": tag}, f"{name} has no tag {tag} any more")
