"""What routers share: from scores to the weights of the best experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from xpert.errors import unknown
from xpert.protocols import Candidate, WeightedExperts

__all__ = ["check_known", "ranked", "ranked_array", "softmax_weights"]


def ranked(scores: Mapping[str, float]) -> tuple[Candidate, ...]:
    """Candidates, best first; ties by key, so that the order in which experts were given makes no difference."""
    return tuple(Candidate(key, score) for key, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def ranked_array(keys: Sequence[str], scores: NDArray[np.float64]) -> tuple[Candidate, ...]:
    """`ranked` of scores [m] that follow `keys`, which are sorted."""
    order = np.argsort(-scores, kind="stable").tolist()
    values = scores.tolist()
    return tuple(Candidate(keys[place], values[place]) for place in order)


def softmax_weights(candidates: Iterable[Candidate], *, temperature: float) -> WeightedExperts:
    """softmax(score / temperature) over the candidates, heaviest first."""
    chosen = list(candidates)
    best = max(candidate.score for candidate in chosen)
    raw = [math.exp((candidate.score - best) / temperature) for candidate in chosen]
    return tuple((candidate.expert, weight / sum(raw)) for candidate, weight in zip(chosen, raw, strict=True))


def check_known(key: str, known: Iterable[str]) -> None:
    """Raises NotFound, with the nearest key, for an expert that the mixture does not hold."""
    keys = list(known)
    if key not in keys:
        raise unknown("expert", key, keys)
