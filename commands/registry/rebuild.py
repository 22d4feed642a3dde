"""`xpert registry rebuild`."""

from __future__ import annotations

import dataclasses

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options
from xpert.errors import Corrupt
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@registry_options
def command(session: Session, registry: Registry) -> None:
    """Make the records' names and the index again from the blobs; mend damaged documents from their copies."""
    done = registry.rebuild(session.progress)
    lines = [f"{done.versions} versions, {done.removed} removed; {len(done.restored)} documents brought back"]
    lines += [f"  {name}" for name in done.restored[:20]]
    lines += [f"  and {len(done.restored) - 20} more"] if len(done.restored) > 20 else []
    lines += [f"not usable: {problem}" for problem in done.problems]
    value = {"registry": registry.location, **dataclasses.asdict(done)}
    session.result(value, "\n".join(lines))
    if done.problems:
        raise Corrupt(f"{len(done.problems)} documents could not be used", where=registry.location)
