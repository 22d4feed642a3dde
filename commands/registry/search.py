"""`xpert registry search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, skills_shown, table
from xpert.registry.store import Hit, Registry

__all__ = ["command"]


@click.command()
@click.argument("text", nargs=-1)
@click.option(
    "--base",
    metavar="MODEL",
    help="Only experts of this base model (its reference, the last part of it, or fingerprint).",
)
@click.option("--kind", type=click.Choice(["expert", "mixture"]), help="Only experts, or only mixtures.")
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    metavar="SCORE",
    help="Only where a skill asked for, or any if none is, scores this much, from 0 to 1.",
)
@click.option("--embedder", metavar="SPEC", help="Also find what is close in meaning: minilm, st:NAME.")
@click.option(
    "--taxonomy", metavar="FILE", help="A taxonomy of skills.  [default: $XPERT_TAXONOMY, or the built-in one]"
)
@click.option("--limit", type=click.IntRange(1), help="At most so many.")
@registry_options
def command(session: Session, registry: Registry, text: Sequence[str], taxonomy: str | None, **options: Any) -> None:
    """Search names, descriptions and skills; the words' beginnings suffice, and a taxonomy says what they mean.

    `french translation` also finds experts of `translation_fr`. With --embedder, likeness of meaning counts too.
    """
    from xpert.registry.skills.taxonomy import Taxonomy

    hits = registry.search(
        " ".join(text),
        taxonomy=Taxonomy.open(taxonomy),
        device=session.device,
        progress=session.progress,
        **options,
    )
    if hits and hits[0].partial:
        session.progress.say("nothing holds all of these words; what follows holds some of them")
    value = [
        {
            **hit.version.to_dict(),
            "ref": hit.version.ref,
            "skill": hit.skill,
            "score": hit.score,
            "similarity": hit.similarity,
            "partial": hit.partial,
        }
        for hit in hits
    ]
    session.result({"hits": value}, lambda: _text(hits) if hits else _nothing(registry, options["base"]))


def _nothing(registry: Registry, base: str | None) -> str:
    """That nothing was found, and the base models there are where the one asked for is not among them."""
    if base is None or registry.search("", base=base, limit=1):
        return "nothing found"
    there = sorted(
        {
            f"{hit.version.base_shown} ({hit.version.base_fingerprint[:12]})"
            for hit in registry.search("")
            if hit.version.base
        }
    )
    return f"nothing found: no expert is of the base {base!r}. There are those of {', '.join(there[:6]) or 'none'}"


def _text(hits: Sequence[Hit]) -> str:
    rows = [
        (
            *(hit.version.ref, hit.version.kind, hit.version.base_shown or "-", skills_shown(hit.version)),
            "-" if hit.score is None else f"{hit.skill} {hit.score:.3f}",
            *(() if hit.similarity is None else (f"{hit.similarity:.2f}",)),
        )
        for hit in hits
    ]
    head = ("VERSION", "KIND", "BASE", "SKILLS", "BEST")
    if any(hit.similarity is not None for hit in hits):
        return table((*head, "LIKE"), [row if len(row) > len(head) else (*row, "-") for row in rows])
    return table(head, rows)
