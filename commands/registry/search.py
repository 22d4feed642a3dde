"""`xpert registry search`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, skills_shown, table
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("text", nargs=-1)
@click.option("--base", metavar="MODEL", help="Only experts of this base model (its reference or fingerprint).")
@click.option("--min-score", type=float, help="Only where a skill asked for, or any if none is, scores this much.")
@registry_options
def command(
    session: Session, registry: Registry, text: Sequence[str], base: str | None, min_score: float | None
) -> None:
    """Search names, descriptions and skills; the words' beginnings suffice."""
    hits = registry.search(" ".join(text), base=base, min_score=min_score)
    value = [{**hit.version.to_dict(), "ref": hit.version.ref, "skill": hit.skill, "score": hit.score} for hit in hits]
    rows = [
        (
            *(hit.version.ref, hit.version.kind, hit.version.base or "-"),
            *(skills_shown(hit.version), "-" if hit.score is None else f"{hit.skill} {hit.score:.3f}"),
        )
        for hit in hits
    ]
    found = table(("VERSION", "KIND", "BASE", "SKILLS", "BEST"), rows)
    session.result({"hits": value}, found if hits else "nothing found")
