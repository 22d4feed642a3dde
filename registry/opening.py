"""Opening a registry by its location: the one place that knows which kind of registry an address means."""

from __future__ import annotations

import os
from pathlib import Path

from xpert import plugins
from xpert.errors import BadInput
from xpert.registry.names import url_scheme
from xpert.registry.store import Registry

__all__ = ["open_registry"]


def open_registry(location: str | Path | None = None) -> Registry:
    """The registry at a path or URL; without one, `$XPERT_REGISTRY` or the user's data folder.

    Nothing is read or made yet. Raises BadInput for an address that means none.
    """
    text = str(location) if location is not None else os.environ.get("XPERT_REGISTRY", "")
    scheme = None if isinstance(location, Path) else url_scheme(text)
    if scheme in (None, "file"):
        return Registry(location)
    from xpert.registry.mirror import RemoteRegistry

    known = {"file"}
    for name in plugins.names("remote"):
        member = plugins.load("remote", name)
        if scheme in member.schemes:
            return RemoteRegistry(member(text))
        known.update(member.schemes)
    raise BadInput(
        f"no registries are known at {scheme}:// addresses",
        where=f"{scheme}://...",
        hint=f"known: {', '.join(sorted(known))}",
    )
