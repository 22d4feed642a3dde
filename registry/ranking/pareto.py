"""Score beside cost: the experts that no other beats in everything, and the best by a weighed sum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.card import ExpertCard
from xpert.registry.intake import WEIGHTS_FILE

if TYPE_CHECKING:
    from xpert.registry.store import Details

__all__ = ["COSTS", "OBJECTIVES", "Front", "Weighed", "expert_costs", "pareto", "read_latencies", "weigh"]

COSTS = ("rank", "size", "latency")
"""Lower is better: the adapter's rank, the bytes of its weights, seconds an item."""
OBJECTIVES = ("score", *COSTS)
MENDING = {"latency": "profile anew, or give --latency FILE", "rank": "the card must name it, under adapter.rank"}

Values = Mapping[str, Mapping[str, float]]
"""system -> objective -> value; one that is not known is left out."""


@dataclass(frozen=True)
class Front:
    """`front`: the systems that no other dominates, in the order given. `dominated`: system -> those of the front that
    are at least as good in every objective and better in one. `unknown`: system -> the objectives it lacks a value of,
    for which it is not compared."""

    objectives: tuple[str, ...]
    front: tuple[str, ...]
    dominated: Mapping[str, tuple[str, ...]]
    unknown: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Weighed:
    """score - sum over the costs of weight * cost / (the highest cost of all), best first; the choice is the first."""

    weights: Mapping[str, float]
    values: Mapping[str, float]

    @property
    def choice(self) -> str:
        return next(iter(self.values))


def pareto(values: Values, objectives: Sequence[str]) -> Front:
    """The systems that are not dominated: no other is as good in every objective and better in one.

    Of `score` more is better, of the others less. Equals do not dominate each other. Raises BadInput for an objective
    that is known of nobody. Time O(n^2 k).
    """
    _check_objectives(objectives)
    unknown = {s: tuple(o for o in objectives if o not in known) for s, known in values.items()}
    unknown = {system: missing for system, missing in unknown.items() if missing}
    systems = [system for system in values if system not in unknown]
    nowhere = [o for o in objectives if values and all(o not in known for known in values.values())]
    if nowhere:
        raise BadInput(f"no expert's {nowhere[0]} is known", hint=MENDING.get(nowhere[0]))
    table = np.array(
        [[-values[s][o] if o == "score" else values[s][o] for o in objectives] for s in systems], dtype=np.float64
    ).reshape(len(systems), len(objectives))
    dominates = _dominates(table)
    best = np.asarray(~dominates.any(axis=0))
    return Front(
        tuple(objectives),
        tuple(system for system, stays in zip(systems, best, strict=True) if stays),
        {
            system: tuple(systems[by] for by in np.flatnonzero(dominates[:, number] & best))
            for number, system in enumerate(systems)
            if not best[number]
        },
        unknown,
    )


def weigh(values: Values, weights: Mapping[str, float]) -> Weighed:
    """What each system is worth once its costs are paid.

    A cost is taken as a share of the highest among the systems, so that a weight says how much score the costliest
    must be ahead of one that costs nothing. Raises BadInput for a cost that a system lacks. Source: the routing
    objective of Tryage (arXiv:2308.11601), loss plus weighted costs, with a score for the loss.
    """
    for cost, weight in weights.items():
        if cost not in COSTS:
            raise BadInput(f"{cost!r} is no cost", hint=f"known: {', '.join(COSTS)}")
        if not math.isfinite(weight) or weight < 0:
            raise BadInput(f"the weight of {cost} is {weight:g}", hint="write a number of 0 or more")
        missing = [system for system, known in values.items() if cost not in known]
        if missing:
            raise BadInput(f"the {cost} of {missing[0]} is not known", hint=MENDING.get(cost))
    most = {cost: max((known[cost] for known in values.values()), default=0.0) for cost in weights}
    worth = {
        system: known["score"] - sum(w * known[cost] / most[cost] for cost, w in weights.items() if most[cost])
        for system, known in values.items()
    }
    return Weighed(dict(weights), dict(sorted(worth.items(), key=lambda item: (-round(item[1], 9), item[0]))))


def expert_costs(
    details: Sequence[Details], latencies: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """ref -> cost -> value, of what is known.

    Latency is what `latencies` says of the ref or the name; without any it is the profile's `seconds_per_item`, which
    compares experts only where one machine scored them all.
    """
    costs: dict[str, dict[str, float]] = {}
    for one in details:
        card = ExpertCard.from_dict(one.document, where=one.version.ref)
        found = costs.setdefault(one.version.ref, {})
        weights = sum(file.size for file in one.files if file.path == WEIGHTS_FILE)
        found["size"] = float(weights or one.version.size)
        rank = card.adapter.get("rank")
        if isinstance(rank, int | float):
            found["rank"] = float(rank)
        if latencies is not None:
            seconds = latencies.get(one.version.ref, latencies.get(one.version.name))
        else:
            seconds = card.profile.figures.get("seconds_per_item") if card.profile else None
        if seconds is not None:
            found["latency"] = float(seconds)
    return costs


def read_latencies(path: Path) -> dict[str, float]:
    """A JSON object: `OWNER/NAME` or `OWNER/NAME@VERSION` -> seconds."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput("no such file", where=str(path), hint="check the path") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"not a JSON file: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise BadInput("not an object of seconds by name", where=str(path), hint='write {"OWNER/NAME": 0.12, ...}')
    for name, seconds in value.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise BadInput(f"the latency of {name} is {seconds!r}", where=str(path), hint="write seconds, 0 or more")
    return {name: float(seconds) for name, seconds in value.items()}


def _check_objectives(objectives: Sequence[str]) -> None:
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise BadInput(f"{objective!r} is no objective", hint=f"known: {', '.join(OBJECTIVES)}")
    if len(set(objectives)) != len(objectives) or not objectives:
        raise BadInput("name each objective once", hint="such as score,size,latency")


def _dominates(table: NDArray[np.float64]) -> NDArray[np.bool_]:
    """values [n, k], lower is better -> [n, n]: whether a dominates b."""
    n = len(table)
    as_good, better = np.ones((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    for column in table.T:
        as_good &= column[:, None] <= column[None, :]
        better |= column[:, None] < column[None, :]
    found: NDArray[np.bool_] = as_good & better
    return found
