"""`xpert registry tag`."""

from __future__ import annotations

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.argument("tag", metavar="TAG")
@registry_options
def command(session: Session, registry: Registry, ref: str, tag: str) -> None:
    """Move a tag to a version, such as `stable`; NAME@TAG then means that version.

    `latest` may be moved too: it stays there until the next version is published.
    """
    version = registry.tag(ref, tag)
    session.result({"ref": version.ref, "tag": tag}, f"{version.name}@{tag} is {version.ref} now")
