"""`xpert registry site`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, size_shown
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where to.")
@click.option("--title", default="Registry", show_default=True, help="What the pages are headed with.")
@registry_options
def command(session: Session, registry: Registry, out: Path, title: str) -> None:
    """Write the registry as a folder of web pages, which need no server; a site written there before is replaced."""
    from xpert.registry.site.data import gather
    from xpert.registry.site.writing import write_site

    found = gather(registry, title=title, progress=session.progress)
    written = write_site(found, out, progress=session.progress)
    value = {
        "path": str(written.folder),
        "names": written.names,
        "files": written.files,
        "size": written.size,
        "problems": found.problems,
    }
    counts = f"{written.names:,} names, {written.files:,} files, {size_shown(written.size)}"
    session.result(value, f"{out / 'index.html'}: {counts}")
