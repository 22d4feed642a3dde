"""`xpert prototypes`: centroids of an expert's exemplars, for routers that compare embeddings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import click

from xpert.commands.options import Session, common_options

__all__ = ["command"]


@click.command("prototypes")
@click.argument("expert", type=click.Path(path_type=Path), metavar="EXPERT")
@click.option(
    "--embedder", default="minilm", show_default=True, metavar="minilm|st:NAME|lm", help="In whose space they lie."
)
@click.option(
    "--centroids", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="At most this many a skill."
)
@click.option("--base", metavar="MODEL", help="Where the base model for embedder lm lies, if not where EXPERT says.")
@common_options
def command(session: Session, expert: Path, embedder: str, centroids: int, base: str | None) -> None:
    """Give the expert in folder EXPERT its prototypes: centroids of its exemplars, per skill.

    They go into prototypes.safetensors and into the card, where those of other embedders stay. The space must not
    depend on what else is embedded, so lsa, which is fitted on its texts, is refused.
    """
    from xpert.experts.prototypes import PROTOTYPES_FILE, add_prototypes

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
    session.result({"expert": str(expert), **dataclasses.asdict(part)}, text)
