"""`xpert registry skills`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, table
from xpert.registry.skills.skill_holders import Holder, holders
from xpert.registry.skills.taxonomy import VARIABLE, Skill, Taxonomy
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("name", required=False, metavar="[SKILL]")
@click.option(
    "--taxonomy",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Skills of your own, as YAML or JSON.  [default: ${VARIABLE}, or the built-in ones]",
)
@registry_options
def command(session: Session, registry: Registry, name: str | None, taxonomy: Path | None) -> None:
    """Print the tree of skills; or one skill, by any of its names, with the experts that have it."""
    known = Taxonomy.open(taxonomy)
    about = {"taxonomy": known.source, "fingerprint": known.fingerprint}
    if name is None:
        skills = [{**skill.to_dict(), "path": list(known.path(skill.name))} for skill in known]
        session.result({**about, "skills": skills}, "\n".join(_tree(known)))
        return
    skill = known.lookup(name)
    held = holders(registry, known, skill.name)
    value = {
        **about,
        **skill.to_dict(),
        "path": list(known.path(skill.name)),
        "children": list(known.children(skill.name)),
        "experts": [holder.to_dict() for holder in held],
    }
    session.result(value, _shown(known, skill, held))


def _tree(known: Taxonomy) -> Iterator[str]:
    def lines(name: str, depth: int) -> Iterator[str]:
        yield f"{'  ' * depth + name:<30} {known[name].about}".rstrip()
        for child in known.children(name):
            yield from lines(child, depth + 1)

    for root in known.roots:
        yield from lines(root, 0)


def _shown(known: Taxonomy, skill: Skill, held: list[Holder]) -> str:
    facts = {
        "path": " > ".join(known.path(skill.name)),
        "about": skill.about,
        "also called": ", ".join(skill.aliases),
        "words": ", ".join(skill.words),
        "below it": ", ".join(known.children(skill.name)),
    }
    lines = [skill.name, *(f"  {key:<12} {value}" for key, value in facts.items() if value), ""]
    if not held:
        return "\n".join([*lines, "no expert of this registry has it"])
    rows = [
        (
            *(holder.ref, holder.skill, holder.metric or "-", _number(holder.expert), _number(holder.base)),
            *("-" if holder.expert is None else f"{holder.expert - (holder.base or 0.0):+.3f}", str(holder.n or "-")),
            holder.why,
        )
        for holder in held
    ]
    return "\n".join([*lines, table(("VERSION", "SKILL", "METRIC", "EXPERT", "BASE", "GAIN", "N", ""), rows)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
