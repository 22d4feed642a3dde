"""What a request as a whole says of the experts: cosines between its prompt and what each expert is for.

They go to a token gate as `EngineRequest.gate_bias`, beside what the gate sees in the token (the global term of
GLIDER, https://arxiv.org/abs/2410.07172).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from xpert.embedding import normalise, open_embedder
from xpert.errors import BadInput, unknown
from xpert.protocols import RoutableExpert, WeightedExperts

if TYPE_CHECKING:
    from xpert.protocols import Floats

__all__ = ["BiasedGate", "ExpertCosines"]


@runtime_checkable
class BiasedGate(Protocol):
    """A gate whose requests need a bias, which `request_bias` makes for the experts of a mixture."""

    def request_bias(
        self,
        experts: Sequence[RoutableExpert],
        *,
        descriptions: Mapping[str, str] | None = None,
        base: str | None = None,
        device: str = "auto",
        seed: int = 0,
    ) -> ExpertCosines: ...


class ExpertCosines:
    """Cosines of prompts to experts, in an embedding space.

    An expert stands there as its description, where `descriptions` (key -> text) has one, else as the mean of its
    exemplar prompts. An embedder that is fitted learns from the exemplars and descriptions. Preparing embeds them all;
    a prompt costs one embedding and one product with [experts, d].

    Raises BadInput for an expert with neither description nor exemplars, NotFound for a description of no expert.
    """

    def __init__(
        self,
        experts: Sequence[RoutableExpert],
        *,
        embedder: str = "lsa",
        descriptions: Mapping[str, str] | None = None,
        base: str | None = None,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        given = dict(descriptions or {})
        self.keys = tuple(expert.key for expert in experts)
        for key in given:
            if key not in self.keys:
                raise unknown("expert", key, self.keys)
        self._embedder = open_embedder(embedder, base=base, device=device, seed=seed)
        # In an order of their own: the axes of a fitted space depend on the order of its texts, and cosines must not.
        texts = {expert.key: _texts(expert, given.get(expert.key)) for expert in experts}
        ordered = [text for key in sorted(texts) for text in texts[key]]
        if ordered:
            self._embedder.fit(ordered)
        self._places = _means(self._embedder.embed(ordered), sorted(texts), texts, self.keys) if ordered else None

    def cosines(self, prompts: Sequence[str]) -> Floats:
        """float32 [n, experts] in [-1, 1], in the experts' order; 0 for a prompt without content."""
        if self._places is None or not prompts:
            return np.zeros((len(prompts), len(self.keys)), np.float32)
        found: Floats = np.clip(normalise(self._embedder.embed(prompts)) @ self._places.T, -1, 1)
        # Rounded, since a product's last bits depend on the size of the batch and replies must not.
        return np.round(found, 5)

    def gate_bias(self, prompts: Sequence[str]) -> list[WeightedExperts]:
        """(expert key, cosine) pairs for each prompt, as `EngineRequest.gate_bias` takes them."""
        return [tuple(zip(self.keys, row, strict=True)) for row in self.cosines(prompts).tolist()]


def _texts(expert: RoutableExpert, description: str | None) -> tuple[str, ...]:
    texts = (description,) if description is not None else expert.exemplars
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise BadInput(
            f"expert {expert.key!r} has neither a description nor exemplars, which its cosine needs",
            hint="train it with shots, or give a description",
        )
    return kept


def _means(rows: Floats, order: Sequence[str], texts: Mapping[str, tuple[str, ...]], keys: Sequence[str]) -> Floats:
    """Unit means of each expert's rows, which lie in `order`: [experts, d] in the order of `keys`."""
    ends = np.cumsum([len(texts[key]) for key in order]).tolist()
    means = {key: rows[end - len(texts[key]) : end].mean(axis=0) for key, end in zip(order, ends, strict=True)}
    return normalise(np.stack([means[key] for key in keys]))
