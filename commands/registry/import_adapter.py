"""`xpert registry import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import entry_options, registry_options
from xpert.printable import printable
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("source", metavar="FOLDER|hf:OWNER/NAME[/FOLDER][@REVISION]")
@click.option("--name", required=True, metavar="OWNER/NAME", help="The name to publish under.")
@click.option(
    "--base",
    metavar="MODEL",
    help="The base model: a folder, a .gguf file or a hub name.  [default: the one the adapter names, if it is here]",
)
@click.option("--description", metavar="TEXT", help="What it does.  [default: what its model card says]")
@click.option("--skills", metavar="A,B,...", help="The skills it was made for.")
@click.option("--licence", metavar="NAME", help="The licence of its weights.  [default: what its model card says]")
@click.option(
    "--exemplars",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts of what it is for, by which routers find it; 64 at most are kept.",
)
@entry_options
@registry_options
def command(
    session: Session,
    registry: Registry,
    source: str,
    name: str,
    base: str | None,
    description: str | None,
    skills: str | None,
    licence: str | None,
    exemplars: Path | None,
    max_size: float,
    tags: Sequence[str],
    allow_secret_like: bool,
) -> None:
    """Publish a LoRA adapter made elsewhere as an expert.

    Its weights are taken byte for byte, after a check that they fit the base model; what the engine cannot serve is
    refused. Of the Hub three files are downloaded: weights, configuration and model card.

    Its scores are not known yet: pull it, profile it with `xpert profile`, and publish the folder again.
    """
    from xpert.experts.importing import Told, import_adapter

    names = None if skills is None else tuple(skill.strip() for skill in skills.split(",") if skill.strip())
    told = Told(base, description, names, licence, exemplars)
    made = import_adapter(
        source,
        name,
        registry,
        told,
        tags=tags,
        max_gib=max_size,
        allow_secret_like=allow_secret_like,
        progress=session.progress,
    )
    version, card = made.version, made.card
    lines = [
        f"{'already ' if version.repeated else ''}published {version.ref}: rank {card.adapter['rank']}, "
        f"{card.adapter['modules']} modules of {printable(Path(card.base.ref).name)}"
    ]
    lines += [f"warning: {printable(warning)}" for warning in made.warnings]
    if made.left_out:
        lines.append(f"left out: {printable(', '.join(made.left_out))}")
    value = {
        "ref": version.ref,
        "repeated": version.repeated,
        "base": card.base.ref,
        "adapter": dict(card.adapter),
        "origin": card.training["imported"],
        "warnings": list(made.warnings),
        "left_out": list(made.left_out),
    }
    session.result(value, "\n".join(lines))
