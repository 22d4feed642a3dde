"""Opening an embedder by its spec: `lsa`, `minilm`, `st:FOLDER-or-name`, `lm`, or one of another distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.progress import SILENT, Progress
from xpert.protocols import Embedder, EmbedderContext, Floats, RowWorker

__all__ = ["FIELDS", "EmbeddingPass", "FittedEmbedder", "ShardedEmbedder", "normalise", "open_embedder"]

FIELDS: dict[str, Callable[[str, str], str]] = {
    "prompt": lambda prompt, response: prompt,
    "response": lambda prompt, response: response,
    "both": lambda prompt, response: f"{prompt}\n{response}",
}
"""What of a row is embedded: (prompt, response) -> text."""


@runtime_checkable
class FittedEmbedder(Protocol):
    """An embedder that learns from the corpus, and whose learnt state is plain arrays that can be stored."""

    def fit_embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        """`fit` and then `embed` of the same texts, for less than both."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What `fit` learnt; `restore` of it gives the same embeddings without fitting again."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None: ...


@runtime_checkable
class ShardedEmbedder(Protocol):
    """An embedder whose heavy part needs no fitting, so that it can be run anywhere, a shard of texts at a time."""

    identity: str

    def raw(self, texts: Sequence[str]) -> Floats:
        """What the model gives for each text, [m, d]; the same whatever the other texts are."""

    def settle(self, rows: Floats) -> Floats:
        """The pool's embeddings from all its raw ones, [n, d]: instead of `fit` and `embed`, in this process."""


@dataclass(frozen=True)
class EmbeddingPass:
    """A pass: the raw embeddings `rows` [m, d] of rows.

    `embedder` is the opened one where the pass is run in this process; it does not travel.
    """

    spec: str
    embed_field: str
    base: str | None
    seed: int
    embedder: ShardedEmbedder | None = None
    name: ClassVar[str] = "embeddings"
    shard_rows: ClassVar[int] = 1024

    @property
    def key(self) -> Mapping[str, Any]:
        embedder = self.embedder or self._opened("auto")
        return {"embedder": embedder.identity, "field": self.embed_field}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "embedder": None}

    def _opened(self, device: str) -> ShardedEmbedder:
        embedder = open_embedder(self.spec, base=self.base, device=device, seed=self.seed)
        assert isinstance(embedder, ShardedEmbedder)
        return embedder

    def open(self, device: str) -> RowWorker:
        embedder = self.embedder or self._opened(device)
        text = FIELDS[self.embed_field]
        return lambda rows: {"rows": embedder.raw([text(row.prompt, row.response) for row in rows])}


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
