"""`xpert registry sign`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import passphrase_option, registry_options
from xpert.registry.signing.keys import SigningKey, passphrase_from, signing_key_path
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The private key, as keygen made it.  [default: $XPERT_SIGNING_KEY]",
)
@passphrase_option("The key's passphrase is the first line of this file.")
@registry_options
def command(session: Session, registry: Registry, ref: str, key: Path | None, passphrase_file: Path | None) -> None:
    """Vouch for a version: add your signature to those it has. Pull it and look at it first."""
    signing = SigningKey.load(signing_key_path(key), passphrase_from(passphrase_file))
    version = registry.sign(ref, signing)
    value = {"ref": version.ref, "digest": version.digest, "fingerprint": signing.public.fingerprint}
    session.result(value, f"signed {version.ref} by {signing.public.fingerprint}")
