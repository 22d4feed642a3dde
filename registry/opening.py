"""Opening a registry by its location: the one place that knows which kind of registry an address means."""

from __future__ import annotations

from pathlib import Path

from xpert.registry.store import Registry

__all__ = ["open_registry"]


def open_registry(location: str | Path | None = None) -> Registry:
    """The registry at a path or URL; without one, `$XPERT_REGISTRY` or the user's data folder.

    Nothing is read or made yet. Raises BadInput for an address that means none.
    """
    return Registry(location)
