"""The prototypes that an expert's folder holds, as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xpert.errors import Corrupt
from xpert.protocols import Floats
from xpert.registry.card import Prototypes

__all__ = ["read_prototypes"]


def read_prototypes(folder: Path, part: Prototypes) -> Floats:
    """The centroids [labels, dimensions] of an entry of the card. Raises Corrupt where they are not as it says."""
    found: Floats | None = _tensors(folder / part.file).get(part.tensor)
    if found is None or found.shape != (len(part.labels), part.dimensions) or found.dtype != np.float32:
        raise Corrupt(
            f"holds no prototypes of {part.embedder!r} as the card describes them",
            where=str(folder / part.file),
            hint="make them again with `xpert prototypes`",
        )
    return found


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.is_file():
        return {}
    try:
        return dict(load(path.read_bytes()))
    except SafetensorError as error:
        raise Corrupt(f"not a sound safetensors file: {error}", where=str(path)) from None
