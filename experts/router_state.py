"""The file of what a router has learned: arrays in safetensors, and plain facts in its metadata. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from xpert.errors import Corrupt
from xpert.protocols import RouterState
from xpert.storage import write_file

__all__ = ["ROUTER_FILE", "read_router_state", "write_router_state"]

ROUTER_FILE = "router.safetensors"


def write_router_state(path: Path, state: RouterState) -> None:
    """Writes the file whole; the same state gives the same bytes."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(state.tensors[name]) for name in sorted(state.tensors)}
    write_file(path, save(tensors, {"facts": json.dumps(dict(state.facts), sort_keys=True, allow_nan=False)}))


def read_router_state(path: Path) -> RouterState:
    """Raises Corrupt for a file that cannot be read as one."""
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if not isinstance(facts, dict):
            raise TypeError("its facts are no mapping")
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"the router's state is damaged: {error!r}", where=str(path)) from None
    return RouterState(tensors, facts)
