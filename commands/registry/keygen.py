"""`xpert registry keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session, common_options
from xpert.commands.registry._shared import passphrase_option

__all__ = ["command"]


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to.")
@click.option("--comment", default="", metavar="TEXT", help="Whose key it is, for the public line.")
@passphrase_option("Encrypt the private key with the first line of this file.")
@common_options
def command(session: Session, out: Path, comment: str, passphrase_file: Path | None) -> None:
    """Make a key to sign with: FILE is private, FILE.pub is for those who shall trust it."""
    from xpert.registry.signing.keys import SigningKey, passphrase_from

    made = SigningKey.generate(out, comment=comment, passphrase=passphrase_from(passphrase_file)()).public
    value = {"key": made.key, "fingerprint": made.fingerprint, "private": str(out), "public": f"{out}.pub"}
    session.result(value, f"{made.fingerprint}  {out} (keep it secret), {out}.pub (give it away)")
