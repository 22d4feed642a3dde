"""Where routers that learn place prompts: an embedder, whose part of the router's state makes it anew."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.embedding import FittedEmbedder, open_embedder
from xpert.errors import BadInput, Corrupt
from xpert.experts.routers._familiarity import Familiarity
from xpert.protocols import Floats, RouterState

__all__ = ["PromptSpace"]

_PREFIX = "embedder."
_MEAN = "mean"
_LEAST_USUAL = 0.25
"""The share of training prompts that are less familiar to the others than a prompt must be to stay where it is."""
_WORD = re.compile(r"\w+")


class PromptSpace:
    """Prompts -> float32 [n, d], of length 1 or less.

    With an embedder that was fitted on the training prompts (lsa), a row is drawn towards their mean, the more the less
    familiar its words are (see `Familiarity`): of a prompt that shares only a question mark with them, a linear model
    says what it says on average. `towards` "zero" instead makes its cosines small. Since new prompts of the same kind
    hold unknown words too, one that is as familiar as three quarters of the training prompts are to each other stays
    where it is. A prompt costs one embedding.
    """

    def __init__(self, spec: str, *, base: str | None, seed: int, device: str, towards: str = "mean") -> None:
        self.spec, self.towards = spec, towards
        self._embedder = open_embedder(spec, base=base, device=device, seed=seed)
        self._rows = 0
        self._familiarity: Familiarity | None = None
        self._to_others: Familiarity | None = None  # of a training prompt: to all the others
        self._mean = np.zeros(0, np.float32)
        self._usual = 1.0

    def fit(self, prompts: Sequence[str]) -> Floats:
        """Learns from the training prompts and embeds them."""
        self._rows = len(prompts)
        if not isinstance(self._embedder, FittedEmbedder):
            self._embedder.fit(prompts)
            return self._embedder.embed(prompts)
        self._mean = self._embedder.fit_embed(prompts).mean(axis=0)
        self._know_words(self._embedder.state())
        if self._to_others is not None:
            self._usual = max(0.01, float(np.quantile(self._to_others.of(prompts), _LEAST_USUAL)))
        return self.embed(prompts)

    def embed(self, prompts: Sequence[str]) -> Floats:
        rows = self._embedder.embed(prompts)
        if self._familiarity is None:
            return rows
        known = np.minimum(1, self._familiarity.of(prompts) / np.float32(self._usual))[:, None]
        drawn: Floats = known * rows if self.towards == "zero" else known * rows + (1 - known) * self._mean
        return drawn

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What `restore` needs beside `facts`; nothing for an embedder that came trained."""
        if not isinstance(self._embedder, FittedEmbedder):
            return {}
        state = {**self._embedder.state(), _MEAN: self._mean}
        return {_PREFIX + name: tensor for name, tensor in state.items()}

    def facts(self) -> dict[str, Any]:
        return {"spec": self.spec, "identity": self._embedder.identity, "rows": self._rows, "usual": self._usual}

    def restore(self, state: RouterState) -> None:
        """Raises BadInput where the state was learned with another model, Corrupt where it lacks the embedder's part.

        A fitted embedder is wholly in the state, so that its version and seed may differ.
        """
        facts = state.facts.get("embedder")
        if (
            not isinstance(facts, Mapping)
            or not isinstance(facts.get("rows"), int)
            or not isinstance(facts.get("usual"), int | float)
        ):
            raise Corrupt("the router's state does not say how prompts were embedded", hint="train the router again")
        self._rows, self._usual = facts["rows"], float(facts["usual"])
        if not isinstance(self._embedder, FittedEmbedder):
            if facts.get("identity") != self._embedder.identity:
                raise BadInput(
                    f"the router learned with embeddings of {facts.get('identity')}, and here is "
                    f"{self._embedder.identity}",
                    hint="train it again with this embedder",
                )
            return
        own = {k.removeprefix(_PREFIX): np.asarray(v) for k, v in state.tensors.items() if k.startswith(_PREFIX)}
        try:
            self._mean = own[_MEAN]
            self._embedder.restore(own)
            self._know_words(own)
        except (KeyError, ValueError) as error:
            raise Corrupt(
                f"the embedder in the router's state is damaged: {error!r}", hint="train the router again"
            ) from None

    def _know_words(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Of a fitted embedder's terms the single words, with their idf, are what is familiar."""
        if "terms" not in state or "idf" not in state:
            return
        terms = bytes(np.ascontiguousarray(state["terms"])).decode().split("\n")
        idf = {term: float(weight) for term, weight in zip(terms, state["idf"], strict=False) if _WORD.fullmatch(term)}
        unknown = math.log(1 + self._rows) + 1
        self._familiarity = Familiarity.known(idf, unknown=unknown)
        rarest = max(idf.values(), default=0.0)  # a prompt's words that the embedder would not know without it
        self._to_others = Familiarity.known({w: i for w, i in idf.items() if i < rarest - 1e-4}, unknown=unknown)
