"""What routers that learn share: observations in an order of their own, and what a state must say to be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config
from xpert.errors import BadInput, Corrupt
from xpert.protocols import LearnedRouter, Observations, RoutableExpert, Route, RouteRequest, RouterState

__all__ = [
    "BASE",
    "Floats64",
    "Observed",
    "canonical",
    "check_state",
    "finite",
    "left_out_routes",
    "places_of",
    "state_facts",
    "untrained",
]

BASE = "base"
Floats64 = NDArray[np.float64]
_FORMAT = 1


@dataclass(frozen=True)
class Observed:
    """Observations sorted by request and by subject, so that the order they came in changes nothing.

    subjects: the experts' keys, sorted, then "base"; scores, losses and confidences [n, m] follow them.
    """

    requests: tuple[RouteRequest, ...]
    subjects: tuple[str, ...]
    scores: Floats64
    losses: Floats64
    confidences: Floats64 | None

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]

    def part(self, rows: NDArray[np.int64]) -> Observations:
        """What was observed of some of the prompts."""
        return Observations(
            tuple(self.requests[row] for row in rows),
            self.subjects,
            self.scores[rows],
            self.losses[rows],
            None if self.confidences is None else self.confidences[rows],
        )


def canonical(router: str, experts: Sequence[RoutableExpert], seen: Observations) -> Observed:
    """Raises BadInput for observations of other subjects than these experts and the base, without prompts, or whose
    tables do not fit them."""
    keys = sorted(expert.key for expert in experts)
    if len(set(seen.subjects)) != len(seen.subjects) or set(seen.subjects) != {*keys, BASE}:
        missing = sorted({*keys, BASE} - set(seen.subjects))
        foreign = sorted(set(seen.subjects) - {*keys, BASE})
        what = f"{missing[0]!r} was not observed" if missing else f"{(foreign or seen.subjects)[0]!r} is none of them"
        raise BadInput(
            f"router {router} learns from observations of the mixture's experts and the base: {what}",
            hint="observe the mixture again",
        )
    if not seen.requests:
        raise BadInput(f"router {router} has no observations to learn from", hint="observe a suite with items")
    shape = (len(seen.requests), len(seen.subjects))
    tables = {"scores": seen.scores, "losses": seen.losses}
    if seen.confidences is not None:
        tables["confidences"] = seen.confidences
    for name, table in tables.items():
        if table.shape != shape:
            raise BadInput(f"the observed {name} have the shape {table.shape}, and not {shape}")
    rows = sorted(range(shape[0]), key=lambda row: (seen.requests[row].id, seen.requests[row].prompt))
    columns = [seen.subjects.index(subject) for subject in (*keys, BASE)]
    part = np.ix_(rows, columns)
    return Observed(
        tuple(seen.requests[row] for row in rows),
        (*keys, BASE),
        np.asarray(seen.scores, np.float64)[part],
        np.asarray(seen.losses, np.float64)[part],
        None if seen.confidences is None else np.asarray(seen.confidences, np.float64)[part],
    )


def left_out_routes(
    new: Callable[[], LearnedRouter], experts: Sequence[RoutableExpert], seen: Observed, folds: int = 3
) -> list[Route]:
    """Routes of the observed prompts by routers that learned from the others: equal prompts fall into one fold.

    With fewer distinct prompts than twice the folds, by one that learned from all. Costs as many trainings as folds.
    """
    fold_of = {prompt: place % folds for place, prompt in enumerate(dict.fromkeys(seen.prompts))}
    fold = np.array([fold_of[prompt] for prompt in seen.prompts])
    parts = [np.flatnonzero(fold == number) for number in range(folds)]
    if len(fold_of) < 2 * folds:
        parts = [np.arange(len(fold))]
    routes: dict[int, Route] = {}
    for part in parts:
        rest = np.setdiff1d(np.arange(len(fold)), part) if len(parts) > 1 else part
        router = new()
        router.learn(experts, seen.part(rest))
        routes |= zip(part.tolist(), router.route([seen.requests[row] for row in part]), strict=True)
    return [routes[row] for row in range(len(fold))]


def finite(seen: Observed, name: str) -> Floats64:
    """The scores or losses; raises BadInput, naming prompt and subject, for one that is no number."""
    table: Floats64 = getattr(seen, name)
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        row, column = wrong[0]
        one = {"scores": "score", "losses": "loss"}[name]
        raise BadInput(
            f"the observed {one} of {seen.subjects[column]!r} on prompt "
            f"{seen.requests[row].id!r} is {table[row, column]}",
            hint="observe it again, or leave that prompt out",
        )
    return table


def state_facts(
    router: str, options: Config, trained: Sequence[str], subjects: Sequence[str], **more: Any
) -> dict[str, Any]:
    """Facts of a state: whose it is, the options that training depended on (their field names), whom it knows."""
    given = options.to_dict()
    return {
        "router": router,
        "format": _FORMAT,
        "options": {name: given[name] for name in trained},
        "subjects": list(subjects),
        **more,
    }


def check_state(
    router: str, options: Config, trained: Sequence[str], state: RouterState, tensors: Sequence[str] = ()
) -> tuple[str, ...]:
    """The subjects a state knows. Raises BadInput where another router or other options made it, Corrupt where it lacks
    something."""
    facts = state.facts
    if facts.get("router") != router:
        raise BadInput(
            f"the state is one of router {facts.get('router')!r}, and the mixture's is {router}", hint="train it anew"
        )
    subjects, learned = facts.get("subjects"), facts.get("options")
    missing = [name for name in tensors if name not in state.tensors]
    if facts.get("format") != _FORMAT or not isinstance(subjects, list) or not isinstance(learned, Mapping) or missing:
        what = f"lacks {missing[0]!r}" if missing else "is not whole, or of another version"
        raise Corrupt(f"the state of router {router} {what}", hint="train the router again")
    given = options.to_dict()
    for name in trained:
        if learned.get(name) != given[name]:
            raise BadInput(
                f"router {router} was trained with {name.replace('_', '-')}={learned.get(name)}, and the mixture says "
                f"{given[name]}",
                hint="train it again with this parameter",
            )
    return tuple(str(subject) for subject in subjects)


def places_of(router: str, experts: Sequence[RoutableExpert], subjects: Sequence[str]) -> NDArray[np.int64]:
    """Where the experts, sorted by key, stand among a state's subjects. Raises BadInput for one that is not there."""
    place = {subject: index for index, subject in enumerate(subjects)}
    keys = sorted(expert.key for expert in experts)
    for key in keys:
        if key not in place or key == BASE:
            raise BadInput(
                f"router {router} has not learned expert {key!r}",
                hint="observe the mixture with it, and train the router again",
            )
    return np.array([place[key] for key in keys], dtype=np.int64)


def untrained(router: str) -> BadInput:
    return BadInput(
        f"router {router} has to be trained for this mixture first",
        hint=f"run: xpert router train MIXTURE --on SUITE --router {router} -o FILE",
    )
