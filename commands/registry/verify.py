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
    """Read every file and signature and check it; exit status 0 where all is sound.

    Versions that your trust list refuses are named apart: they can be sound all the same.
    """
    found = registry.verify(session.progress)
    refused = registry.refused()
    value = {
        "registry": registry.location,
        "sound": not found,
        "problems": [dataclasses.asdict(problem) for problem in found],
        "refused": [dataclasses.asdict(problem) for problem in refused],
    }
    lines = [str(problem) for problem in found] or ["all is sound"]
    if refused:
        lines += ["", "not to be pulled, by your trust list:", *(f"  {problem}" for problem in refused)]
    session.result(value, "\n".join(lines))
    if found:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise Corrupt(count, where=registry.location, hint="publish damaged experts again from their folders")
