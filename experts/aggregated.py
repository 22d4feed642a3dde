"""A mixture's aggregator, made ready: which one, whether its router gives it anything to do, and what it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.mixture import AggregatorChoice, Mixture, aggregator_options, router_options
from xpert.protocols import Aggregator, Question, Route, Sampling
from xpert.records import Row

__all__ = [
    "check_aggregator",
    "check_one_stage",
    "choices_of",
    "chosen_aggregator",
    "most_experts",
    "open_aggregator",
    "question_of",
    "with_aggregator",
]

NONE = "none"
"""The name by which a mixture's aggregator is switched off."""

_SIZES = ("top", "k")
"""Parameters by which routers say how many experts they name."""


def chosen_aggregator(name: str | None, params: Mapping[str, Any]) -> AggregatorChoice | None:
    """The choice of a command line, its parameters in their own types; None where no name, or `none`, is given.

    Raises NotFound for an unknown name or parameter, BadInput for parameters without a name.
    """
    if name is None or name == NONE:
        if params:
            raise BadInput("--aggregator-param needs an aggregator", hint="give --aggregator NAME")
        return None
    typed = aggregator_options(name, params).to_dict()
    return AggregatorChoice(name, {key: typed[key] for key in (given.replace("-", "_") for given in params)})


def with_aggregator(mixture: Mixture, choice: AggregatorChoice | None) -> Mixture:
    """The mixture with another aggregator, or none; raises BadInput where its gate or router does not go with it."""
    changed = replace(mixture, aggregator=choice)
    check_aggregator(changed)
    return changed


def open_aggregator(mixture: Mixture, *, seed: int = 0, device: str = "auto") -> Aggregator | None:
    """The mixture's aggregator, prepared, if it has one; raises BadInput where it cannot work with the experts or with
    a router that has a second stage."""
    choice = mixture.aggregator
    if choice is None:
        return None
    if mixture.router == "cascade" and _router_options(mixture).mode == "after":
        raise _two_stages()
    options = aggregator_options(choice.name, choice.params)
    made: Aggregator = plugins.load("aggregator", choice.name)(options, seed=seed, device=device)
    made.prepare([expert.routable() for expert in mixture.experts])
    return made


def check_aggregator(mixture: Mixture) -> None:
    """Raises BadInput where the aggregator needs several experts' replies and the router names one expert at most."""
    choice = mixture.aggregator
    if choice is None or not plugins.load("aggregator", choice.name).several or most_experts(mixture) > 1:
        return
    if len(mixture.experts) < 2:
        raise BadInput(
            f"aggregator {choice.name} makes one reply of several experts', and the mixture has one expert",
            hint="mix more experts, or take an aggregator of samples such as complexity",
        )
    size = next((name for name in _SIZES if hasattr(_router_options(mixture), name)), None)
    mend = f"give --param {size}=3" if size else "take another router"
    raise BadInput(
        f"aggregator {choice.name} makes one reply of several experts', and router {mixture.router} names one expert",
        hint=mend,
    )


def most_experts(mixture: Mixture) -> int:
    """The most experts that a route of the mixture may name, as far as the router's parameters tell."""
    options, most = _router_options(mixture), len(mixture.experts)
    if mixture.router == "oracle":
        return 1
    if mixture.router == "fixed":
        return 1 if options.expert is not None else int(len(options.weights) or most)
    sizes: list[int] = [getattr(options, name) for name in _SIZES if isinstance(getattr(options, name, None), int)]
    return min([most, *sizes])


def _router_options(mixture: Mixture) -> Any:
    return router_options(mixture.router, mixture.router_params)


def question_of(row: Row, route: Route, sampling: Sampling, choices: Sequence[str] = ()) -> Question:
    """What an aggregator is asked for a row. Raises BadInput for a route with a second stage."""
    check_one_stage(route, where=f"prompt {row.id}")
    return Question(row.id, row.messages, route, sampling, tuple(choices) or choices_of(row))


def check_one_stage(route: Route, *, where: str | None = None) -> None:
    """Raises BadInput for a route with a second stage, which no aggregator can obey."""
    if route.escalation is not None:
        raise _two_stages(where)


def _two_stages(where: str | None = None) -> BadInput:
    return BadInput(
        "a router with a second stage and an aggregator exclude each other: what several replies agree on has no "
        "confidence of one answer",
        where=where,
        hint="take another router, or aggregator none",
    )


def choices_of(row: Row) -> tuple[str, ...]:
    """The column `choices` of a row, if it is a list of texts."""
    found = row.columns.get("choices")
    if isinstance(found, list | tuple) and all(isinstance(choice, str) and choice.strip() for choice in found):
        return tuple(found)
    return ()
