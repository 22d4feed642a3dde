"""`xpert registry show`."""

from __future__ import annotations

import dataclasses

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import interval, numbers_shown, registry_options, size_shown, table
from xpert.registry.store import Details, Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@registry_options
def command(session: Session, registry: Registry, ref: str) -> None:
    """Show a version's card, skill profile and files."""
    details = registry.show(ref)
    value = {
        **details.version.to_dict(),
        "ref": details.version.ref,
        "versions": list(details.versions),
        "tags": dict(details.tags),
        "files": [dataclasses.asdict(file) for file in details.files],
        "card" if details.version.kind == "expert" else "mixture": details.document,
    }
    session.result(value, _shown(details))


def _shown(details: Details) -> str:
    version = details.version
    facts = {
        "kind": version.kind,
        "versions": numbers_shown(details.versions),
        "tags": ", ".join(f"{tag} ({number})" for tag, number in sorted(details.tags.items())),
        "description": version.description,
        "base": f"{version.base} ({version.base_fingerprint[:12]})" if version.base else "",
        "skills": ", ".join(version.strengths),
        "experts": ", ".join(version.uses),
        "licences": ", ".join(f"{name} ({n})" for name, n in (details.document.get("licences") or {}).items()),
        "digest": version.digest,
        "created": version.created,
    }
    lines = [version.ref, *(f"  {key:<12} {value}" for key, value in facts.items() if value)]
    profile = details.document.get("profile") if version.kind == "expert" else None
    if profile:
        rows = [
            (
                *(skill, score["metric"], interval(score["expert"]), interval(score["base"])),
                *(f"{score['expert']['score'] - score['base']['score']:+.3f}", str(score["expert"]["n"])),
            )
            for skill, score in profile["skills"].items()
        ]
        title = f"skill profile on {profile['suite']} (95 % intervals)"
        lines += ["", title, table(("SKILL", "METRIC", "EXPERT", "BASE", "GAIN", "N"), rows)]
    files = [(file.path, size_shown(file.size), file.sha256[:16]) for file in details.files]
    return "\n".join([*lines, "", table(("FILE", "SIZE", "SHA256"), files)])
