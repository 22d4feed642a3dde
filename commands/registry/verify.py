"""`xpert registry verify`."""

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
    """Read every file and check it; exit status 0 where all is sound."""
    found = registry.verify(session.progress)
    value = {"registry": registry.location, "sound": not found, "problems": [dataclasses.asdict(p) for p in found]}
    session.result(value, "\n".join(str(problem) for problem in found) if found else "all is sound")
    if found:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise Corrupt(count, where=registry.location, hint="publish damaged experts again from their folders")
