"""Opening a registry by its location: the one place that knows which kind of registry an address means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xpert import plugins
from xpert.errors import BadInput
from xpert.registry.names import url_scheme
from xpert.registry.store import Registry

if TYPE_CHECKING:
    from xpert.registry.remote import Remote

__all__ = ["open_registry"]

_HALF_AN_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/?([^/].*)")
"""`hf:lab` and `s3:/bucket`, which without this would be folders of those names."""


def open_registry(location: str | Path | None = None) -> Registry:
    """The registry at a path or URL; without one, `$XPERT_REGISTRY` or the user's data folder.

    Nothing is read or made yet. Raises BadInput for an address that means none.
    """
    text = str(location) if location is not None else os.environ.get("XPERT_REGISTRY", "")
    scheme = None if isinstance(location, Path) else url_scheme(text)
    if scheme in (None, "file"):
        if scheme is None and not isinstance(location, Path):
            _refuse_half_an_address(text)
        return Registry(location)
    from xpert.registry.mirror import RemoteRegistry

    known = {"file"}
    for member in _remotes():
        if scheme in member.schemes:
            return RemoteRegistry(member(text))
        known.update(member.schemes)
    raise BadInput(
        f"no registries are known at {scheme}:// addresses",
        where=f"{scheme}://...",
        hint=f"known: {', '.join(sorted(known))}",
    )


def _remotes() -> Iterator[type[Remote]]:
    for name in plugins.names("remote"):
        yield plugins.load("remote", name)


def _refuse_half_an_address(text: str) -> None:
    match = _HALF_AN_ADDRESS.fullmatch(text)
    if match is None or Path(text).exists():
        return
    scheme, rest = match[1].lower(), match[2]
    if any(scheme in member.schemes for member in _remotes()):
        raise BadInput(
            "no address of a registry", where=text, hint=f"write {scheme}://{rest}, or ./{text} for a folder"
        )
