"""How much each expert of a mixture is used: from routed prompts, or from what `xpert route` and `xpert run` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, NotFound, unknown
from xpert.experts.mixture import Mixture
from xpert.experts.routing import MixtureRouter, explain, route_request
from xpert.records import Row

__all__ = ["Usage", "measure_usage", "read_usage", "usage_of"]


@dataclass(frozen=True)
class Usage:
    """shares [experts]: of all weight that experts were given, in the keys' order, sum 1. routing [prompts, experts]:
    the router's score of each expert for each prompt, or its weight where no scores were kept. base: the share of
    prompts that were left to the base model."""

    keys: tuple[str, ...]
    shares: tuple[float, ...]
    routing: NDArray[np.float64]
    base: float


def measure_usage(mixture: Mixture, rows: Sequence[Row], *, seed: int = 0, device: str = "auto") -> Usage:
    """Routes the prompts of `rows`; the base model is not loaded unless the router needs it."""
    routes = MixtureRouter(mixture, seed=seed, device=device).route([route_request(row) for row in rows])
    lines = [explain(row.id, route) for row, route in zip(rows, routes, strict=True)]
    return usage_of(lines, mixture.keys, where="the prompts")


def read_usage(path: Path, keys: Sequence[str]) -> Usage:
    """A log of JSON lines, each with `experts` [{expert, weight}] and perhaps `candidates` [{expert, score}].

    Raises BadInput naming the line that is of another form or names an expert that is not among `keys`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path)) from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput("not a log of routes", where=str(path), hint="`xpert route` prints one") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append(_checked(json.loads(line)))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
                raise BadInput(
                    f"line {number} is no route", where=str(path), hint="`xpert route` prints them"
                ) from None
    return usage_of(lines, keys, where=str(path))


def _checked(line: Any) -> dict[str, list[dict[str, Any]]]:
    def numbers(name: str, field: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"expert": str(one["expert"]), field: float(one[field])} for one in line.get(name, ())
        ]
        if not all(math.isfinite(one[field]) for one in found):
            raise ValueError(name)
        return found

    if "experts" not in line:
        raise KeyError("experts")
    return {"experts": numbers("experts", "weight"), "candidates": numbers("candidates", "score")}


def usage_of(lines: Sequence[Mapping[str, Any]], keys: Sequence[str], *, where: str) -> Usage:
    """Usage from routes as plain JSON. An expert that a route does not list (it lists the best 50) scores 0 there.

    Raises BadInput where no prompt was sent to any expert.
    """
    place = {key: index for index, key in enumerate(keys)}
    weights = np.zeros((len(lines), len(keys)))
    scores = np.zeros_like(weights)
    scored = bool(lines) and all(line.get("candidates") for line in lines)
    for row, line in enumerate(lines):
        for name, field, table in (("experts", "weight", weights), ("candidates", "score", scores)):
            for one in line.get(name, ()):
                if one["expert"] not in place:
                    raise unknown("expert", one["expert"], keys, where=where)
                table[row, place[one["expert"]]] += one[field]
    drawn = weights.sum(axis=0)
    if not drawn.sum() > 0:
        raise BadInput("no prompt was sent to any expert", where=where, hint="give prompts of the experts' task")
    base = float((weights.sum(axis=1) == 0).mean())
    return Usage(tuple(keys), tuple((drawn / drawn.sum()).tolist()), scores if scored else weights, base)
