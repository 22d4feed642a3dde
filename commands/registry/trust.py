"""`xpert registry trust`: whose signatures count, and what must be signed."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session, common_options
from xpert.commands.registry._shared import table
from xpert.registry.signing.keys import PublicKey
from xpert.registry.signing.trust import TrustEntry, TrustList, edit_trust, trust_path

__all__ = ["command"]


@click.group()
def command() -> None:
    """Say whose signatures count, and what must be signed; kept in $XPERT_TRUST, or trust.json of your settings."""


@command.command()
@click.argument("key", type=click.Path(path_type=Path), metavar="KEY.pub")
@click.option("--owner", required=True, metavar="PATTERN", help="What it speaks for: OWNER, OWNER/NAME, or '*'.")
@common_options
def add(session: Session, key: Path, owner: str) -> None:
    """Let a key speak for an owner, who from then on must sign."""
    public = PublicKey.read(key)
    edit_trust(lambda known: known.with_key(public, owner))
    effect = "" if owner == "*" else f"; what it has not signed of {owner} is refused from now on"
    value = {"fingerprint": public.fingerprint, "for": owner, "comment": public.comment, "trust": str(trust_path())}
    session.result(value, f"{public.fingerprint} speaks for {owner}{effect}")


@command.command("list")
@common_options
def list_keys(session: Session) -> None:
    """Show the keys and the demands."""
    known = TrustList.read()
    value = known.to_dict()
    for shown, entry in zip(value["keys"], known.entries, strict=True):
        shown["fingerprint"] = entry.fingerprint
    rows = [(e.pattern, e.fingerprint, e.comment or "-", e.added) for e in known.entries]
    lines = [table(("FOR", "KEY", "COMMENT", "ADDED"), rows)] if rows else [f"no key is trusted ({trust_path()})"]
    if known.required:
        lines.append(f"must be signed: {', '.join(known.required)}")
    session.result({**value, "trust": str(trust_path())}, "\n".join(lines))


@command.command()
@click.argument("fingerprint")
@click.option("--owner", metavar="PATTERN", help="For this pattern only.")
@common_options
def remove(session: Session, fingerprint: str, owner: str | None) -> None:
    """Trust a key no longer."""
    gone: list[TrustEntry] = []

    def change(known: TrustList) -> TrustList:
        changed, removed = known.without_key(fingerprint, owner)
        gone[:] = removed
        return changed

    known = edit_trust(change)
    bare = known.freed_by(gone)
    value = {"removed": [{"fingerprint": e.fingerprint, "for": e.pattern} for e in gone], "no_longer_signed": bare}
    text = f"{gone[0].fingerprint} no longer speaks for {', '.join(e.pattern for e in gone)}"
    session.result(value, f"{text}; unsigned versions of {', '.join(bare)} are accepted again" if bare else text)


@command.command()
@click.argument("pattern")
@click.option("--drop", is_flag=True, help="Demand it no longer.")
@common_options
def require(session: Session, pattern: str, drop: bool) -> None:
    """Refuse what PATTERN (OWNER, OWNER/NAME, or '*') covers unless a trusted key signed it."""
    known = edit_trust(lambda known: known.requiring(pattern, drop=drop))
    text = f"{pattern} {'need not' if drop else 'must'} be signed"
    session.result({"required": list(known.required)}, text)
