"""What the commands of the registry share: the option that opens one, and how versions are shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options
from xpert.printable import printable
from xpert.registry.card import Interval
from xpert.registry.opening import open_registry
from xpert.registry.store import MAX_GIB, Registry, Version

__all__ = ["interval", "numbers_shown", "passphrase_option", "registry_options", "size_shown", "skills_shown", "table"]


def registry_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--registry besides the common options; the function receives the open `registry`."""

    @functools.wraps(function)
    def told(session: Session, registry: Registry, **options: Any) -> Any:
        if registry.notice is not None:
            session.progress.say(registry.notice)
        return function(session=session, registry=registry, **options)

    return click.option(
        "--registry",
        callback=lambda context, parameter, value: open_registry(value),
        metavar="URL",
        help="A folder, or a URL such as s3://BUCKET/FOLDER.  [default: $XPERT_REGISTRY, or the user's data folder]",
    )(common_options(told))


def entry_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What every way into a registry takes: --max-size, --tag and --allow-secret-like, as `max_size`, `tags` and
    `allow_secret_like`."""
    for option in (
        click.option(
            "--allow-secret-like",
            is_flag=True,
            help="Publish texts in which something looks like a token, key or password.",
        ),
        click.option("--tag", "tags", multiple=True, metavar="TAG", help="Also move this tag to it; may be repeated."),
        click.option(
            "--max-size",
            type=click.FloatRange(0, min_open=True),
            default=MAX_GIB,
            show_default=True,
            metavar="GIB",
            help="Refuse an expert larger than this.",
        ),
    ):
        function = option(function)
    return function


def passphrase_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--passphrase-file, as `passphrase_file`. A file, since what stands in a command line is seen by others."""
    return click.option("--passphrase-file", type=click.Path(path_type=Path), metavar="FILE", help=text)


def interval(value: dict[str, Any]) -> str:
    interval = Interval(**value)
    return f"{interval.score:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def skills_shown(version: Version) -> str:
    shown = ", ".join(version.strengths[:3])
    return f"{shown} +{len(version.strengths) - 3}" if len(version.strengths) > 3 else shown or "-"


def numbers_shown(versions: Sequence[int]) -> str:
    """`1-3,5`: runs of versions."""
    runs: list[list[int]] = []
    for version in versions:
        if runs and runs[-1][1] == version - 1:
            runs[-1][1] = version
        else:
            runs.append([version, version])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def size_shown(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell. A cell is one line: breaks in it are shown, so none can feign a row."""
    head, *rows = [[printable(cell) for cell in row] for row in (head, *rows)]
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)
