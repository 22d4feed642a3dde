"""`xpert registry publish`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import entry_options, passphrase_option, registry_options
from xpert.errors import BadInput
from xpert.registry.signing.keys import ENVIRONMENT, SigningKey, passphrase_from
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="EXPERT|MIXTURE")
@click.option("--name", required=True, metavar="OWNER/NAME", help="The name to publish under.")
@entry_options
@click.option("--no-latest", is_flag=True, help="Leave the tag `latest` where it is.")
@click.option(
    "--sign",
    "key",
    type=click.Path(path_type=Path),
    envvar=ENVIRONMENT,
    metavar="FILE",
    help=f"Sign it with this private key.  [default: ${ENVIRONMENT}, if set]",
)
@passphrase_option("The key's passphrase is the first line of this file.")
@registry_options
def command(
    session: Session,
    registry: Registry,
    source: Path,
    name: str,
    max_size: float,
    tags: Sequence[str],
    no_latest: bool,
    allow_secret_like: bool,
    key: Path | None,
    passphrase_file: Path | None,
) -> None:
    """File an expert folder or a mixture as the next version of a name.

    A mixture is what `xpert mix` or `xpert train --mixture` wrote; of the latter, publish the experts first.
    """
    if no_latest and "latest" in tags:
        raise BadInput("--tag latest and --no-latest contradict each other", hint="leave one of them out")
    signing = SigningKey.load(key.expanduser(), passphrase_from(passphrase_file)) if key else None
    version = registry.publish(
        source,
        name,
        tags=tags,
        latest=not no_latest,
        max_gib=max_size,
        allow_secret_like=allow_secret_like,
        progress=session.progress,
    )
    value = {"ref": version.ref, "repeated": version.repeated, **version.to_dict(), "registry": registry.location}
    done = f"{'already ' if version.repeated else ''}published {version.ref}"
    if signing is not None:
        registry.sign(version.ref, signing)
        value["signed_by"] = signing.public.fingerprint
        done += f", signed by {signing.public.fingerprint}"
    session.result(value, done)
