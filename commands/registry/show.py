"""`xpert registry show`."""

from __future__ import annotations

import dataclasses

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import interval, numbers_shown, registry_options, size_shown, table
from xpert.printable import printable
from xpert.registry.signing.standing import Signer, Standing, standing
from xpert.registry.signing.trust import TrustList
from xpert.registry.store import Details, Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@registry_options
def command(session: Session, registry: Registry, ref: str) -> None:
    """Show a version's card, skill profile and files."""
    details = registry.show(ref)
    record = registry.record(details.version.ref)
    trust = standing(record, registry.signatures_of(record), TrustList.read())
    value = {
        **details.version.to_dict(),
        "ref": details.version.ref,
        "versions": list(details.versions),
        "tags": dict(details.tags),
        "files": [dataclasses.asdict(file) for file in details.files],
        "signatures": [dataclasses.asdict(signer) for signer in trust.signers],
        "trust": {"ok": trust.ok, "reason": trust.reason},
        "card" if details.version.kind == "expert" else "mixture": details.document,
    }
    session.result(value, _shown(details, trust))


def _shown(details: Details, trust: Standing) -> str:
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
        "signed by": "; ".join(_signer(signer) for signer in trust.signers),
        "trust": trust.reason if trust.ok else f"not to be pulled: {trust.reason}",
    }
    if trust.ok is None:
        facts["trust"] = trust.reason
    lines = [version.ref, *(f"  {key:<12} {printable(value)}" for key, value in facts.items() if value)]
    profile = details.document.get("profile") if version.kind == "expert" else None
    if profile:
        rows = [
            (
                *(skill, score["metric"], interval(score["expert"]), interval(score["base"])),
                *(f"{score['expert']['score'] - score['base']['score']:+.3f}", str(score["expert"]["n"])),
            )
            for skill, score in profile["skills"].items()
        ]
        title = f"skill profile on {printable(profile['suite'])} (95 % intervals)"
        lines += ["", title, table(("SKILL", "METRIC", "EXPERT", "BASE", "GAIN", "N"), rows)]
    files = [(file.path, size_shown(file.size), file.sha256[:16]) for file in details.files]
    return "\n".join([*lines, "", table(("FILE", "SIZE", "SHA256"), files)])


def _signer(signer: Signer) -> str:
    named = f"{signer.comment} ({signer.fingerprint})" if signer.comment else signer.fingerprint
    return f"{named}, {'trusted' if signer.trusted else 'not trusted for it'}"
