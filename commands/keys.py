"""`xpert keys`: the API keys that `xpert serve --api-keys FILE` asks for."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session, common_options

__all__ = ["command"]

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Make, list and remove the API keys of a server.

    FILE is what `xpert serve --api-keys FILE` reads. It holds digests, so that no key can be found in it; a running
    server obeys its changes from the next request on.
    """


@command.command("add")
@click.argument("file", type=_FILE, metavar="FILE")
@click.argument("name", metavar="NAME")
@click.option("--requests-per-minute", type=click.IntRange(1), metavar="N", help="At most. [default: no limit]")
@click.option(
    "--tokens-per-minute",
    type=click.IntRange(1),
    metavar="N",
    help="At most, of prompts and replies together. [default: no limit]",
)
@click.option("--concurrent", type=click.IntRange(1), metavar="N", help="Requests at a time. [default: no limit]")
@click.option("--models", metavar="A,B,...", help="Models that may be asked for. [default: all]")
@common_options
def add(
    session: Session,
    file: Path,
    name: str,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrent: int | None,
    models: str | None,
) -> None:
    """Make a key for NAME, and print it this once.

    FILE is made if there is none.
    """
    from xpert.experts.server.key_file import add_key

    allowed = tuple(model.strip() for model in models.split(",")) if models is not None else None
    holder, key = add_key(
        file,
        name,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent=concurrent,
        models=allowed,
    )
    session.progress.say(f"{name}'s key is shown this once; only its digest is in {file}")
    session.result({"name": holder.name, "key": key, "file": str(file)}, key)


@command.command("list")
@click.argument("file", type=_FILE, metavar="FILE")
@common_options
def list_keys(session: Session, file: Path) -> None:
    """List whose keys there are, with their limits."""
    from xpert.commands.registry._shared import table
    from xpert.experts.server.key_file import KeyHolder, read_keys

    def row(holder: KeyHolder) -> tuple[str, ...]:
        limits = (holder.requests_per_minute, holder.tokens_per_minute, holder.concurrent)
        shown = (f"{limit:,}" if limit is not None else "-" for limit in limits)
        return holder.name, *shown, ",".join(holder.models or ("all",)), holder.created, holder.sha256[:12]

    holders = read_keys(file)
    heads = ("NAME", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "MODELS", "CREATED", "SHA256")
    session.result(
        {"file": str(file), "keys": [holder.to_dict() for holder in holders]},
        lambda: table(heads, [row(holder) for holder in holders]) if holders else f"{file} holds no keys",
    )


@command.command("remove")
@click.argument("file", type=_FILE, metavar="FILE")
@click.argument("name", metavar="NAME")
@common_options
def remove(session: Session, file: Path, name: str) -> None:
    """Take NAME's key out of FILE.

    A running server refuses it from the next request on.
    """
    from xpert.experts.server.key_file import remove_key

    remove_key(file, name)
    session.result({"removed": name, "file": str(file)}, f"removed {name}'s key")
