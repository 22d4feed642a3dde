"""`xpert prototypes`: centroids of an expert's exemplars, for routers that compare embeddings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import click

from xpert.commands.options import Session, common_options
from xpert.errors import BadInput

__all__ = ["command"]


@click.command("prototypes")
@click.argument("expert", type=click.Path(path_type=Path), metavar="EXPERT")
@click.option(
    "--embedder",
    default="minilm",
    show_default=True,
    metavar="minilm|st:NAME|lm|none",
    help="In whose space they lie; none: only add --pilots.",
)
@click.option(
    "--centroids", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="At most this many a skill."
)
@click.option("--base", metavar="MODEL", help="Where the base model for embedder lm lies, if not where EXPERT says.")
@click.option(
    "--pilots",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="First add these prompts to EXPERT's exemplars; `xpert registry gaps` finds some.",
)
@common_options
def command(
    session: Session, expert: Path, embedder: str, centroids: int, base: str | None, pilots: Path | None
) -> None:
    """Give the expert in folder EXPERT its prototypes: centroids of its exemplars, per skill.

    They go into prototypes.safetensors and into the card, where those of other embedders stay. The space must not
    depend on what else is embedded, so lsa, which is fitted on its texts, is refused.

    With --pilots, the prompts of FILE become exemplars of EXPERT, by which routers then find it. Nothing is trained;
    publish EXPERT again to share them.
    """
    from xpert.experts.pilot_prompts import add_pilots
    from xpert.experts.prototypes import PROTOTYPES_FILE, add_prototypes, open_space

    if embedder == "none" and pilots is None:
        raise BadInput("embedder none makes no prototypes", hint="name one (minilm), or give --pilots FILE")
    added: dict[str, int] = {}
    if pilots is not None:
        if embedder not in ("none", "lm"):
            open_space(embedder)  # refused before the exemplars are changed
        added = {"pilots_added": add_pilots(expert, pilots)}
        session.progress.say(f"{expert}: {added['pilots_added']} pilots are new among its exemplars")
    if embedder == "none":
        session.result({"expert": str(expert), **added}, f"{expert}: {added['pilots_added']} pilots added")
        return
    part = add_prototypes(
        expert,
        embedder,
        centroids=centroids,
        base=base,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    skills = Counter(part.labels)
    told = ", ".join(f"{name or 'no skill stated'} {count}" for name, count in skills.items())
    text = f"{expert / PROTOTYPES_FILE}: {len(part.labels)} centroids of {part.dimensions} dimensions ({told})"
    session.result({"expert": str(expert), **added, **dataclasses.asdict(part)}, text)
