"""`xpert registry publish`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.store import MAX_GIB, Registry

__all__ = ["command"]


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="EXPERT|MIXTURE.json")
@click.option("--name", required=True, metavar="OWNER/NAME", help="The name to publish under.")
@click.option(
    "--max-size",
    type=click.FloatRange(0, min_open=True),
    default=MAX_GIB,
    show_default=True,
    metavar="GIB",
    help="Refuse an expert larger than this.",
)
@click.option(
    "--allow-secret-like", is_flag=True, help="Publish texts in which something looks like a token, key or password."
)
@registry_options
def command(
    session: Session, registry: Registry, source: Path, name: str, max_size: float, allow_secret_like: bool
) -> None:
    """File an expert folder or a mixture as the next version of a name."""
    version = registry.publish(
        source, name, max_gib=max_size, allow_secret_like=allow_secret_like, progress=session.progress
    )
    value = {"ref": version.ref, "repeated": version.repeated, **version.to_dict(), "registry": str(registry.folder)}
    session.result(value, f"{'already ' if version.repeated else ''}published {version.ref}")
