"""`xpert registry pull`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to; the cache by default.")
@registry_options
def command(session: Session, registry: Registry, ref: str, out: Path | None) -> None:
    """Copy a version out, every file checked; prints the folder."""
    version = registry.resolve(ref)
    folder = registry.pull(version.ref, out, progress=session.progress)
    session.result({"ref": version.ref, "digest": version.digest, "path": str(folder)}, str(folder))
