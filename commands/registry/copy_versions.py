"""`xpert registry copy`."""

from __future__ import annotations

import dataclasses

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.copying import copy_versions
from xpert.registry.opening import open_registry
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="NAME[@VERSION]...")
@click.option("--to", "target", required=True, metavar="URL", help="The registry to copy into: a folder or a URL.")
@click.option("--all-versions", "every", is_flag=True, help="All versions of names that are given without one.")
@click.option("--tags", is_flag=True, help="Also move the tags there that point to what is copied, except `latest`.")
@click.option(
    "--allow-secret-like", is_flag=True, help="Copy texts in which something looks like a token, key or password."
)
@registry_options
def command(
    session: Session,
    registry: Registry,
    refs: tuple[str, ...],
    target: str,
    every: bool,
    tags: bool,
    allow_secret_like: bool,
) -> None:
    """Copy versions into another registry, under their own numbers; a mixture takes its experts along.

    What is there already stays; a number that is taken by another content there is refused.
    """
    into = open_registry(target)
    copied = copy_versions(
        registry, into, refs, every=every, tags=tags, allow_secret_like=allow_secret_like, progress=session.progress
    )
    value = {"from": registry.location, "to": into.location, "copied": [dataclasses.asdict(one) for one in copied]}
    lines = []
    for one in copied:
        tagged = f", tagged {', '.join(one.tags)}" if one.tags else ""
        lines.append(f"{'copied' if one.new else 'there already:'} {one.ref}{tagged}")
    session.result(value, "\n".join(lines))
