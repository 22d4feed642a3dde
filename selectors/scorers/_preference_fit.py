"""What `qurating` and `critiq` share: a Bradley-Terry scorer fitted to pairs, on embeddings or on the base's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.bradley_terry import PairFit, fit_pairs
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.judges import Judge, open_judge
from xpert.mean_states import MeanStates
from xpert.preferences import Pair, Side, excerpt
from xpert.protocols import Floats
from xpert.records import Message, Row
from xpert.storage import hash_file

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["FEWEST_PAIRS", "PreferenceFit", "RatingOptions", "judge_for", "side_texts"]

FEWEST_PAIRS = 20


@dataclass(frozen=True)
class RatingOptions(Config):
    """What a rating that is learned from pairs is a function of, and how an endpoint is asked."""

    pairs: str | None = option(None, "pairs, JSON lines")
    on: str = option(
        "embeddings",
        "what the rating is a function of: the embeddings (what they see, --embed-field says), or the base's mean last "
        "hidden states over prompt and answer (base)",
        choices=("embeddings", "base"),
    )
    concurrency: int = option(8, "how many questions an endpoint is asked at once", minimum=1)
    timeout: float = option(60.0, "seconds that an endpoint is given for a reply", minimum=0.01)

    def to_dict(self) -> dict[str, Any]:
        """With the content of the file, so that a manifest tells one file of a name from another."""
        content = {"pairs_content": hash_file(Path(self.pairs))} if self.pairs and Path(self.pairs).is_file() else {}
        return {**super().to_dict(), **content}


class PreferenceFit:
    """score = w . x, fitted so that sigmoid(score_a - score_b) is the share of votes for a.

    x is a row's embedding (on=embeddings), or the mean of the base's last hidden states over it (on=base), whose
    dimensions are scaled to one spread first: a few of them are a hundred times the others. Raises BadInput where fewer
    than 20 pairs are given, or the pairs' vectors are all alike.
    """

    def __init__(self, features: Features, pairs: Sequence[Pair], on: str, rng: np.random.Generator) -> None:
        if len(pairs) < FEWEST_PAIRS:
            raise BadInput(
                f"{len(pairs)} decided pairs are too few to learn from; the least is {FEWEST_PAIRS}",
                hint="give more pairs, or a lower conf",
            )
        self._features, self._on = features, on
        self._states = MeanStates(features.base(), features.options.max_length) if on == "base" else None
        left, right = self._sides([pair.a for pair in pairs]), self._sides([pair.b for pair in pairs])
        self._scale = np.ones(left.shape[1])
        if on == "base":
            spread = np.concatenate([left, right]).std(axis=0)
            self._scale = np.where(spread > 0, spread, 1.0)
        differences = (left - right) / self._scale
        if not differences.any():
            raise BadInput("both sides of every pair have the same vector, so nothing tells them apart")
        self.fit: PairFit = fit_pairs(differences, np.array([pair.p for pair in pairs]), rng)
        self._weights = self.fit.weights / self._scale

    def score(self, rows: NDArray[np.int64]) -> Floats:
        if not len(rows):
            return np.empty(0, np.float32)
        # Rounded, so that rows alike score alike whatever the order of the sums was.
        return np.round(self._vectors(rows).astype(np.float64) @ self._weights, 6).astype(np.float32)

    def log(self) -> Mapping[str, Any]:
        fit = self.fit
        accuracy = None if np.isnan(fit.accuracy) else round(fit.accuracy, 3)
        held_out = {"held-out pairs": fit.held_out, "held-out accuracy": accuracy}
        return {"step": "Bradley-Terry fit", "on": self._on, "pairs": fit.pairs, **held_out, "ridge": fit.strength}

    def _vectors(self, rows: NDArray[np.int64]) -> Floats:
        if self._states is not None:
            return np.asarray(self._features.compute(self._states, rows)["state"])
        return np.asarray(self._features.embeddings()[rows])

    def _sides(self, sides: Sequence[Side]) -> NDArray[np.float64]:
        """float64 [m, d]: vectors of pool rows and of texts, in their order."""
        of_rows = {place: side for place, side in enumerate(sides) if isinstance(side, int)}
        texts = {place: side for place, side in enumerate(sides) if isinstance(side, str)}
        parts: list[tuple[list[int], Floats]] = []
        if of_rows:
            parts.append((list(of_rows), self._vectors(np.array(list(of_rows.values()), np.int64))))
        if texts:
            parts.append((list(texts), self._text_vectors(list(texts.values()))))
        found = np.empty((len(sides), parts[0][1].shape[1]), np.float64)
        for places, vectors in parts:
            found[places] = vectors
        return found

    def _text_vectors(self, texts: Sequence[str]) -> Floats:
        if self._states is not None:
            rows = [Row(f"text {place}", (Message("user", ""),), text) for place, text in enumerate(texts)]
            return np.asarray(self._states.open(self._features.device)(rows)["state"])
        # A text that is not split into prompt and answer stands where the embedder looks.
        response = self._features.options.embed_field == "response"
        return self._features.embed(
            Row(f"text {place}", (Message("user", "" if response else text),), text if response else "")
            for place, text in enumerate(texts)
        )


def judge_for(features: Features, spec: str, *, concurrency: int, timeout: float) -> Judge:
    """A judge that works where the features are computed and shows its progress there."""
    return open_judge(
        spec, device=features.device, progress=features.progress, concurrency=concurrency, timeout=timeout
    )


def side_texts(features: Features, pairs: Sequence[tuple[Side, Side]], characters: int) -> list[tuple[str, str]]:
    """The two sides of each pair as a judge is shown them."""
    wanted = sorted({side for pair in pairs for side in pair if isinstance(side, int)})
    shown = {index: excerpt(row, characters) for index, row in zip(wanted, features.pool.rows(wanted), strict=True)}

    def text(side: Side) -> str:
        return shown[side] if isinstance(side, int) else side[: 2 * characters]

    return [(text(a), text(b)) for a, b in pairs]
