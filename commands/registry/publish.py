"""`xpert registry publish`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.errors import BadInput
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
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Also move this tag to it; may be repeated.")
@click.option("--no-latest", is_flag=True, help="Leave the tag `latest` where it is.")
@registry_options
def command(
    session: Session,
    registry: Registry,
    source: Path,
    name: str,
    max_size: float,
    tags: Sequence[str],
    no_latest: bool,
) -> None:
    """File an expert folder or a mixture as the next version of a name."""
    if no_latest and "latest" in tags:
        raise BadInput("--tag latest and --no-latest contradict each other", hint="leave one of them out")
    version = registry.publish(
        source, name, tags=tags, latest=not no_latest, max_gib=max_size, progress=session.progress
    )
    value = {"ref": version.ref, "repeated": version.repeated, **version.to_dict(), "registry": registry.location}
    session.result(value, f"{'already ' if version.repeated else ''}published {version.ref}")
