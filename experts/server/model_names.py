"""What `model` of a request means: the mixture, perhaps with another router, one expert, or the base alone.

three                                  the mixture as it is
three:router=skills,k=3                routed by another router, to three experts
three:aggregator=majority,k=3          each of three experts answers, and the majority is the reply
arithmetic                             one expert
base                                   the base model alone
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput, NotFound, unknown
from xpert.experts.aggregated import check_aggregator
from xpert.experts.mixture import BASE, AggregatorChoice, Mixture
from xpert.experts.router_learning.cross_fitting import learns
from xpert.protocols import WeightedExperts

__all__ = ["Asked", "Way", "by_way", "parse_model"]

_FOR_EVALUATION = frozenset({"oracle"})
_NO_AGGREGATOR = "none"


@dataclass(frozen=True)
class Way(Config):
    """How one request is to be routed and answered, where it differs from the mixture. Everything else is the
    mixture's, or the plug-in's default: a request may not name models to load."""

    router: str | None = option(None, "another router")
    k: int | None = option(None, "how many experts", minimum=1, maximum=64)
    threshold: float | None = option(None, "score under which the base answers")
    aggregator: str | None = option(None, "what makes one reply of several; `none` for none")


@dataclass(frozen=True)
class Asked:
    """experts: those that were named, () for the base; None where the router chooses, by `way`."""

    experts: WeightedExperts | None
    way: Way = Way()


def parse_model(model: str, mixture: Mixture, *, overrides: bool = True) -> Asked:
    """Raises NotFound with the nearest name, BadInput for a wrong way. Without `overrides` no way is taken."""
    if model == mixture.name:
        return Asked(None)
    if model == BASE:
        return Asked(())
    if model in mixture.keys:
        return Asked(((model, 1.0),))
    if not model.startswith(f"{mixture.name}:"):
        raise unknown("model", model, (mixture.name, BASE, *mixture.keys))
    if not overrides:
        raise BadInput(f"this server takes {mixture.name} as it is", hint=f"ask for model {mixture.name!r}")
    given: dict[str, str] = {}
    for part in model.removeprefix(f"{mixture.name}:").split(","):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise BadInput(f"model: {part!r} is not NAME=VALUE", hint=f"as in {mixture.name}:router=skills,k=3")
        if name.strip() in given:
            raise BadInput(f"model names {name.strip()} twice")
        given[name.strip()] = value.strip()
    return Asked(None, Way.from_mapping(given, where="model"))


def by_way(mixture: Mixture, way: Way) -> Mixture:
    """The mixture with the router and the aggregator that a way asks for.

    The mixture's own router keeps its parameters, what it has learned and its calibration, whose bound a threshold
    takes the place of; another begins with its defaults. Raises BadInput or NotFound for what cannot be done.
    """
    if way == Way():
        return mixture
    router = way.router if way.router is not None else mixture.router
    if router in _FOR_EVALUATION:
        raise BadInput(f"router {router} is for evaluations: it reads the answer's skill", where="model")
    plugin = _known("router", router)
    own = router == mixture.router
    params: dict[str, Any] = dict(mixture.router_params) if own else {}
    fields = {field.name for field in dataclasses.fields(plugin.Options)}
    if way.k is not None:
        count = "k" if "k" in fields else "top"
        if count not in fields:
            raise BadInput(f"router {router} has no number of experts to choose", where="model", hint="leave k out")
        params[count] = way.k
    if way.threshold is not None:
        if "threshold" not in fields:
            raise BadInput(f"router {router} has no threshold", where="model", hint="leave it out")
        params["threshold"] = way.threshold
    if learns(router, params) and not (own and mixture.router_state is not None):
        raise BadInput(
            f"router {router} was not trained for this mixture",
            where="model",
            hint="leave it out, or serve what `xpert router train` makes",
        )
    calibration = mixture.calibration if own else None
    if calibration is not None and way.threshold is not None:
        calibration = dataclasses.replace(calibration, reject_below=None)  # the threshold asked for counts instead
    aggregator = mixture.aggregator
    if way.aggregator == _NO_AGGREGATOR:
        aggregator = None
    elif way.aggregator is not None:
        _known("aggregator", way.aggregator)
        same = mixture.aggregator is not None and mixture.aggregator.name == way.aggregator
        aggregator = mixture.aggregator if same else AggregatorChoice(way.aggregator)
    changed = dataclasses.replace(
        mixture,
        router=router,
        router_params=params,
        router_state=mixture.router_state if own else None,
        calibration=calibration,
        aggregator=aggregator,
    )
    try:
        check_aggregator(changed)
    except BadInput as error:
        raise BadInput(error.what, where="model", hint="add k=3, or take another router or aggregator") from None
    return changed


def _known(kind: str, name: str) -> Any:
    try:
        return plugins.load(kind, name)
    except NotFound as error:
        raise BadInput(error.what, where="model", hint=error.hint) from None
