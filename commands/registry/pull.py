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
@click.option("--require-signature", is_flag=True, help="Refuse it unless a key of your trust list signed it.")
@registry_options
def command(session: Session, registry: Registry, ref: str, out: Path | None, require_signature: bool) -> None:
    """Copy a version out, every file and signature checked; prints the folder."""
    version = registry.resolve(ref)
    folder = registry.pull(version.ref, out, require_signature=require_signature, progress=session.progress)
    session.result({"ref": version.ref, "digest": version.digest, "path": str(folder)}, str(folder))
