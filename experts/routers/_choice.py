"""What routers share: from scores to the best experts, their weights and the candidates that a route lists."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import unknown
from xpert.protocols import Candidate, WeightedExperts

__all__ = [
    "SHOWN",
    "best_places",
    "candidates_at",
    "check_known",
    "number_of",
    "ranked",
    "shuffled",
    "softmax_weights",
]

SHOWN = 50
"""Candidates that a route lists, the best ones; and more where more are chosen. Listing 10,000 costs 20 ms a prompt."""


def ranked(scores: Mapping[str, float], most: int = SHOWN) -> tuple[Candidate, ...]:
    """The best `most` candidates, best first; ties by key, so that the order of the experts makes no difference.

    For scores by key, in Python: O(n log n). Routers whose scores are an array use `best_places`.
    """
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:most]
    return tuple(Candidate(key, score) for key, score in best)


def best_places(scores: NDArray[Any], most: int = SHOWN) -> NDArray[np.int64]:
    """Places of the `most` largest of the scores [n], largest first; ties by the lower place.

    Where the scores follow sorted keys, ties go by key, as in `ranked`. Time O(n + most log most). No score is NaN.
    """
    n = len(scores)
    if most < n:
        least = np.partition(scores, n - most)[n - most]
        above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
        kept = np.concatenate([above, equal[: most - len(above)]])
        kept.sort()
    else:
        kept = np.arange(n)
    found: NDArray[np.int64] = kept[np.argsort(-scores[kept], kind="stable")].astype(np.int64)
    return found


def candidates_at(places: NDArray[np.int64], keys: Sequence[str], scores: NDArray[Any]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(keys[place], score) for place, score in zip(places.tolist(), scores[places].tolist(), strict=True)
    )


def softmax_weights(candidates: Iterable[Candidate], *, temperature: float) -> WeightedExperts:
    """softmax(score / temperature) over the candidates, heaviest first."""
    chosen = list(candidates)
    best = max(candidate.score for candidate in chosen)
    raw = [math.exp((candidate.score - best) / temperature) for candidate in chosen]
    total = sum(raw)
    return tuple((candidate.expert, weight / total) for candidate, weight in zip(chosen, raw, strict=True))


def check_known(key: str, known: Iterable[str]) -> None:
    """Raises NotFound, with the nearest key, for an expert that the mixture does not hold."""
    keys = list(known)
    if key not in keys:
        raise unknown("expert", key, keys)


def number_of(*parts: object) -> int:
    """A number below 2**64 from the sha256 of the parts: what draws of a request begin from, in any batch."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def shuffled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One-to-one, every bit dependent on every bit: the last steps of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found
