"""`xpert registry list`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import numbers_shown, registry_options, size_shown, skills_shown, table
from xpert.registry.store import Entry, Registry

__all__ = ["command"]


@click.command()
@registry_options
def command(session: Session, registry: Registry) -> None:
    """List all names with their latest version."""
    entries = registry.list()
    value = [
        {
            **entry.latest.to_dict(),
            "ref": entry.latest.ref,
            "versions": list(entry.versions),
            "tags": dict(entry.tags),
        }
        for entry in entries
    ]
    empty = f"nothing is published in {registry.location} yet"
    result = {"registry": registry.location, "entries": value}
    session.result(result, lambda: _text(entries) if entries else empty)


def _text(entries: Sequence[Entry]) -> str:
    return table(
        ("NAME", "VERSIONS", "TAGS", "KIND", "BASE", "SKILLS", "SIZE", "CREATED"),
        [
            (
                *(entry.latest.name, numbers_shown(entry.versions), _tags(entry), entry.latest.kind),
                *(entry.latest.base_shown or "-", skills_shown(entry.latest), size_shown(entry.latest.size)),
                entry.latest.created,
            )
            for entry in entries
        ],
    )


def _tags(entry: Entry) -> str:
    """`latest` is shown where it is not the newest."""
    newest = entry.versions[-1]
    tags = [f"{t}={n}" for t, n in sorted(entry.tags.items()) if (t, n) != ("latest", newest)]
    return " ".join(tags) or "-"
