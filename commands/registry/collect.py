"""`xpert registry gc`."""

from __future__ import annotations

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, size_shown
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@registry_options
def command(session: Session, registry: Registry, dry_run: bool) -> None:
    """Remove files that no version needs."""
    garbage = registry.gc(dry_run=dry_run)
    value = {"files": garbage.files, "size": garbage.size, "dry_run": dry_run}
    verb = "would remove" if dry_run else "removed"
    session.result(value, f"{verb} {garbage.files} files, {size_shown(garbage.size)}")
