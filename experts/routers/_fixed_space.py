"""The embedder of a router: fitted on the mixture's exemplars, or one whose vectors the cards' prototypes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xpert.embedding import open_embedder
from xpert.progress import SILENT, Progress
from xpert.protocols import Embedder, Floats

__all__ = ["RawEmbedder", "embedder_of", "identity_of"]


class RawEmbedder:
    """A space that stays (see `open_space`) as an embedder: nothing is learned of the texts."""

    def __init__(self, spec: str, *, base: str | None, device: str) -> None:
        from xpert.experts.prototypes import open_space

        self._space = open_space(spec, base=base, device=device)
        self.identity = self._space.identity

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to learn."""

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        return self._space.embed(texts)


def identity_of(spec: str, *, base: str | None, device: str) -> str | None:
    """What prototypes of this embedder go by; None for lsa, which has none. Raises what `open_space` raises."""
    return None if spec == "lsa" else RawEmbedder(spec, base=base, device=device).identity


def embedder_of(
    spec: str, *, base: str | None, device: str, seed: int, raw: bool
) -> tuple[str | None, Callable[[], Embedder]]:
    """(the identity that prototypes go by, a maker of embedders): as the spec says, or `raw`, as prototypes are."""
    if not raw:
        return None, lambda: open_embedder(spec, base=base, device=device, seed=seed)
    embedder = RawEmbedder(spec, base=base, device=device)
    return embedder.identity, lambda: embedder
