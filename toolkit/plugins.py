"""Finding the members of each seam: by file name, or by an entry point of another distribution.

A member is one module whose file name is its plug-in name (`_` read as `-`) and which binds `PLUGIN` to its class.
Files whose names begin with `_` are shared code, not members. Nothing is imported until `load` asks for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xpert.errors import unknown

__all__ = ["KINDS", "Kind", "load", "names"]


@dataclass(frozen=True)
class Kind:
    """A seam: the package whose files are its members, and the entry-point group for those of others.

    Where `also` is (kind, module, function), that kind's members are members here too, made so by the function.
    """

    name: str
    package: str
    also: tuple[str, str, str] | None = None

    @property
    def group(self) -> str:
        return self.package


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("selector", "xpert.selectors", also=("scorer", "xpert.selectors._ranked", "ranked")),
        Kind("scorer", "xpert.selectors.scorers"),
        Kind("orderer", "xpert.exemplars"),
        Kind("embedder", "xpert.embedders"),
        Kind("executor", "xpert.executors"),
        Kind("router", "xpert.experts.routers"),
        Kind("aggregator", "xpert.experts.aggregators"),
        Kind("engine", "xpert.experts.engines"),
        Kind("gate", "xpert.experts.gates"),
        Kind("merger", "xpert.experts.mergers"),
        Kind("decoder", "xpert.experts.decoding"),
        Kind("remote", "xpert.registry.remotes"),
    )
}

# `random.py` would bear the name of a standard module, so the random controls live in `uniform.py`.
_FILE_OF = {"random": "uniform"}
_NAME_OF = {file: name for name, file in _FILE_OF.items()}


def names(kind: str) -> list[str]:
    """The plug-in names of a seam, sorted; loads none of them."""
    also = KINDS[kind].also
    return sorted({*_modules(kind), *(_modules(also[0]) if also else ())})


def load(kind: str, name: str) -> Any:
    """The plug-in's class. Raises NotFound with the nearest name where there is none such."""
    modules = _modules(kind)
    public = _NAME_OF.get(name, name).replace("_", "-")
    if public not in modules:
        also = KINDS[kind].also
        if also is not None and public in _modules(also[0]):
            return getattr(importlib.import_module(also[1]), also[2])(load(also[0], name))
        raise unknown("method" if kind == "selector" else kind, name, names(kind))
    source = modules[public]
    if isinstance(source, importlib.metadata.EntryPoint):
        return source.load()
    return importlib.import_module(source).PLUGIN


@cache
def _modules(kind: str) -> dict[str, str | importlib.metadata.EntryPoint]:
    seam = KINDS[kind]
    found: dict[str, str | importlib.metadata.EntryPoint] = {
        entry.name: entry for entry in importlib.metadata.entry_points(group=seam.group)
    }
    for folder in importlib.import_module(seam.package).__path__:
        for file in sorted(Path(folder).glob("[!_]*.py")):
            public = _NAME_OF.get(file.stem, file.stem).replace("_", "-")
            found[public] = f"{seam.package}.{file.stem}"
    return found
