"""Opening an embedder by its spec: `lsa`, `minilm`, `st:FOLDER-or-name`, `lm`, or one of another distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.progress import SILENT, Progress
from xpert.protocols import Embedder, EmbedderContext, Floats

__all__ = ["FittedEmbedder", "normalise", "open_embedder"]


@runtime_checkable
class FittedEmbedder(Protocol):
    """An embedder that learns from the corpus, and whose learnt state is plain arrays that can be stored."""

    def fit_embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        """`fit` and then `embed` of the same texts, for less than both."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What `fit` learnt; `restore` of it gives the same embeddings without fitting again."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None: ...


def open_embedder(spec: str, *, base: str | None = None, device: str = "auto", seed: int = 0) -> Embedder:
    """The embedder of a spec `NAME` or `NAME:ARGUMENT`, not yet fitted.

    `base` is the base model, which `lm` needs. Raises NotFound for an unknown name, BadInput for an argument that is
    missing or not taken, Unavailable for a package that is not installed.
    """
    name, colon, argument = spec.partition(":")
    context = EmbedderContext(argument=argument if colon else None, base=base, device=device, seed=seed)
    embedder: Embedder = plugins.load("embedder", name)(context)
    return embedder


def normalise(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows [n, d] scaled to length 1 as contiguous float32; a zero row stays zero."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)).astype(np.float32)
    # Below this a row is rounding noise around zero, and scaling it up would make a direction out of nothing.
    norms[norms < 1e-12] = np.inf
    scaled: NDArray[np.float32] = rows / norms[:, None]
    return scaled
