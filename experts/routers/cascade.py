"""A weak subject answers first, and a strong one takes over where that will not do.

mode after: the strong answers anew where the weak answer's confidence is low (Mowst, https://arxiv.org/abs/2311.05185,
with the probabilities of an answer's tokens for the dispersion of a classifier's logits). mode before: one of the two
is asked at once, by the score of another router (RouteLLM, https://arxiv.org/abs/2406.18665).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput, Corrupt
from xpert.experts.routers._choice import check_known
from xpert.experts.routers._cuts import cut_by_count, cut_by_gain
from xpert.experts.routers._learning import (
    BASE,
    Floats64,
    Observed,
    canonical,
    check_state,
    finite,
    left_out_routes,
    places_of,
    state_facts,
    untrained,
)
from xpert.protocols import (
    Escalation,
    LearnedRouter,
    Observations,
    RoutableExpert,
    Route,
    Router,
    RouteRequest,
    RouterState,
    WeightedExperts,
)

__all__ = ["PLUGIN", "CascadeOptions", "CascadeRouter"]

NAME = "cascade"
TRAINED = ("mode", "weak", "strong", "router", "router_params", "share", "price")
"""Options that training depends on; a `threshold` that is given counts instead of the learned one."""
_PREFIX = "router."


@dataclass(frozen=True)
class CascadeOptions(Config):
    weak: str = option(BASE, "who answers first: an expert's key, or base")
    strong: str | None = option(None, "the expert that takes over, or base; by default whom the router names")
    router: str | None = option(
        None, "names the strong, and in mode before gives the score; by default centroid, where one is needed"
    )
    router_params: tuple[str, ...] = option((), "that router's parameters, as KEY=VALUE,KEY=VALUE")
    mode: str = option(
        "after",
        "after: the strong takes over if the weak answer's confidence is low; before: the router's score decides",
        choices=("after", "before"),
    )
    threshold: float | None = option(
        None, "confidence under which (mode after), or score from which (before) the strong answers"
    )
    share: float | None = option(
        None, "share of the observed prompts that the strong shall answer, instead of a threshold", minimum=0, maximum=1
    )
    price: float = option(
        0.0, "score that an answer of the strong must gain to be worth it, where neither is given", minimum=0
    )
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.share is not None:
            raise BadInput("threshold and share exclude each other", hint="give one of them")
        if self.price and (self.threshold is not None or self.share is not None):
            raise BadInput("price is for a threshold that is learned by gain", hint="leave out threshold and share")
        if self.threshold is not None and self.mode == "after" and not 0 <= self.threshold <= 1:
            raise BadInput(f"threshold is {self.threshold:g}; a confidence lies between 0 and 1")
        if self.strong is not None and self.mode == "after" and (self.router or self.router_params):
            raise BadInput("the strong is named, so that no router is asked", hint="leave out router and router-params")
        if self.strong == self.weak:
            raise BadInput(f"weak and strong are both {self.weak!r}", hint="name two")
        if self.strong == BASE and self.mode == "before":
            raise BadInput("the base cannot be the strong in mode before: routers score experts alone")
        if self.router == NAME:
            raise BadInput("a cascade cannot be its own router", hint="name another router")
        self.inner_options()

    @property
    def asked(self) -> str | None:
        """The router that is asked for each prompt, if any is."""
        return None if self.strong is not None and self.mode == "after" else self.router or "centroid"

    def inner_options(self) -> Any:
        """The asked router's options, checked; None where none is asked."""
        if self.asked is None:
            return None
        pairs = [text.partition("=") for text in self.router_params]
        for key, equals, _ in pairs:
            if not key.strip() or not equals:
                raise BadInput(
                    f"router-params: {key!r} is not KEY=VALUE", hint="as in router-params=top=2,mode=centroid"
                )
        options_class = plugins.load("router", self.asked).Options
        given = options_class.from_mapping({k.strip(): v for k, _, v in pairs}, where=f"router {self.asked}")
        return dataclasses.replace(given, base=self.base) if getattr(given, "base", "") is None else given


class CascadeRouter:
    """mode after: a route of the weak with an escalation to the strong under `threshold`. mode before: the strong's
    route where the router scores it `threshold` or more, else the weak's.

    A threshold that is not given is learned on the observed prompts: so that the `share` of them goes to the strong,
    or so that the mean score is the highest when each answer of the strong costs `price`. Mode after needs the
    confidences of the weak's observed answers. A router that has to learn does so from the same prompts; what the
    strong gains is then measured in three parts of them, each routed by one that learned from the others. In mode
    before the share of them that this gives is carried over to the router's own scores, which are lower on new prompts:
    fewer of those may reach the strong. Where the router names nobody but the weak, the weak answers alone. A prompt
    costs what the router costs.
    """

    Options = CascadeOptions
    learned: ClassVar[bool] = True

    @staticmethod
    def untrained(options: CascadeOptions) -> bool:
        """Whether it works without a state: with a threshold, unless the router that it asks has to learn."""
        if options.threshold is None:
            return False
        return options.asked is None or not _has_to_learn(options)

    @staticmethod
    def lacking(options: CascadeOptions, experts: Sequence[RoutableExpert], *, device: str = "auto") -> dict[str, str]:
        """What each expert lacks that the asked router could never name."""
        ask = None if options.asked is None else getattr(plugins.load("router", options.asked), "lacking", None)
        return {} if ask is None else dict(ask(options.inner_options(), experts, device=device))

    def __init__(
        self, options: CascadeOptions, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None:
        self.options, self.seed, self.device = options, seed, device
        self.router: Router | None = None
        self.subjects: tuple[str, ...] | None = None
        self.threshold = options.threshold
        inner_state = None
        if state is not None:
            self.subjects = check_state(NAME, options, TRAINED, state)
            inner_state = _inner_state(state) if options.asked is not None else None
            if self.threshold is None:
                self.threshold = _number(state.facts.get("threshold"))
        if options.asked is not None and (inner_state is not None or not _has_to_learn(options)):
            self.router = self._inner(inner_state)

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        """Raises BadInput for observations that do not fit the experts, or lack confidences that are needed."""
        observed = canonical(NAME, experts, seen)
        inner_state = RouterState({})
        self.subjects = observed.subjects
        self.threshold = self.options.threshold
        if self.options.asked is not None:
            self.router = self._inner(None)
            if _has_to_learn(self.options):
                inner_state = cast(LearnedRouter, self.router).learn(experts, seen)
        self._prepare_router(experts)
        figures: dict[str, float] = {}
        if self.threshold is None:
            self.threshold, figures = self._learned_threshold(experts, observed)
        facts = state_facts(
            NAME,
            self.options,
            TRAINED,
            self.subjects,
            threshold=self.threshold,
            figures=figures,
            inner=dict(inner_state.facts),
        )
        return RouterState({_PREFIX + name: tensor for name, tensor in inner_state.tensors.items()}, facts)

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that was not observed, NotFound where weak or strong are none of them."""
        if self.threshold is None or (self.options.asked is not None and self.router is None):
            raise untrained(NAME)
        if self.subjects is not None:
            places_of(NAME, experts, self.subjects)
        self._prepare_router(experts)

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self.threshold is None:
            raise untrained(NAME)
        return [self._route(strong, self.threshold) for strong in self._strong(requests)]

    def _route(self, strong: Route, threshold: float) -> Route:
        """`strong`: the route it would be if the strong answered."""
        weak = self._weighted(self.options.weak)
        if not self._differ(strong):
            return Route(weak, strong.candidates, f"weak {self.options.weak} answers alone: {strong.reason}")
        if self.options.mode == "after":
            reason = (
                f"weak {self.options.weak} answers; where its confidence is under {threshold:.3f}, "
                f"{_named(strong.experts)} takes over: {strong.reason}"
            )
            return Route(weak, strong.candidates, reason, Escalation(strong.experts, threshold))
        score = _score(strong)
        told = f"score {score:.3f} of {_named(strong.experts)}"
        if score >= threshold:
            return Route(strong.experts, strong.candidates, f"{told} reaches {threshold:.3f}: {strong.reason}")
        reason = f"{told} is under {threshold:.3f}: weak {self.options.weak} answers; {strong.reason}"
        return Route(weak, strong.candidates, reason)

    def _strong(self, requests: Sequence[RouteRequest], asked: list[Route] | None = None) -> list[Route]:
        """Routes as if the strong answered; `asked`: what the router said of the requests, where that is known."""
        if asked is None and self.router is not None:
            asked = self.router.route(requests)
        if self.options.strong is None:
            assert asked is not None
            return asked
        experts = self._weighted(self.options.strong)
        if asked is None:
            return [Route(experts, (), f"strong is always {self.options.strong}")] * len(requests)
        return [Route(experts, route.candidates, f"by {self.options.asked}: {route.reason}") for route in asked]

    def _learned_threshold(
        self, experts: Sequence[RoutableExpert], observed: Observed
    ) -> tuple[float, dict[str, float]]:
        """The threshold and what it does to the observed prompts."""
        options, asked, n = self.options, None, len(observed.requests)
        if options.asked is not None and _has_to_learn(options):
            asked = left_out_routes(lambda: cast(LearnedRouter, self._inner(None)), experts, observed)
        routes = self._strong(observed.requests, asked)
        scores = finite(observed, "scores")
        weak = scores[:, observed.subjects.index(options.weak)]
        strong = np.array([_expected(r.experts, row, observed.subjects) for r, row in zip(routes, scores, strict=True)])
        values = self._wanted(routes, observed)
        known = ~np.isnan(values)
        if not known.any():
            raise BadInput(
                f"on no observed prompt could another take over from {options.weak!r}, so that no threshold is learned",
                hint="name the strong, or let the weak answer everything with router fixed",
            )
        gains = (strong - weak)[known]
        if options.share is not None:
            cut = cut_by_count(values[known], options.share * n)
        else:
            cut = cut_by_gain(values[known], gains - options.price)
        under = values[known] < cut
        figures = {
            "prompts": float(n),
            "strong_share": float(under.sum() / n),
            "weak_score": float(weak.mean()),
            "strong_score": float(strong.mean()),
            "score": float(weak.mean() + gains[under].sum() / n),
        }
        if options.mode == "after":
            return cut, figures
        if asked is not None:  # scores of routers that learned other prompts are on scales of their own
            own = self._wanted(self._strong(observed.requests), observed)
            cut = cut_by_count(own[~np.isnan(own)], float(under.sum())) if (~np.isnan(own)).any() else cut
        # What is strictly under the cut is, with its sign turned, all from the next number on.
        return math.nextafter(-cut, math.inf), figures

    def _wanted(self, routes: Sequence[Route], observed: Observed) -> Floats64:
        """[n], the less, the more the strong is wanted; NaN where it cannot answer, or not be told from the weak."""
        after = self.options.mode == "after"
        values = self._confidences(observed) if after else -np.array([_score(route) for route in routes])
        return np.where([self._differ(route) for route in routes], values, np.nan)

    def _differ(self, strong: Route) -> bool:
        """Whether the strong is another than the weak, and in mode before an expert, since routers score no base."""
        if _names(strong.experts) == _names(self._weighted(self.options.weak)):
            return False
        return bool(strong.experts) or self.options.mode == "after"

    def _confidences(self, observed: Observed) -> Floats64:
        if observed.confidences is None:
            raise BadInput(
                "these observations have no confidences, by which a cascade in mode after learns its threshold",
                hint="observe the mixture again, or give a threshold",
            )
        found: Floats64 = observed.confidences[:, observed.subjects.index(self.options.weak)]
        return found

    def _inner(self, state: RouterState | None) -> Router:
        plugin = plugins.load("router", str(self.options.asked))
        more = {"state": state} if getattr(plugin, "learned", False) else {}
        made: Router = plugin(self.options.inner_options(), seed=self.seed, device=self.device, **more)
        return made

    def _prepare_router(self, experts: Sequence[RoutableExpert]) -> None:
        keys = [expert.key for expert in experts]
        for named in (self.options.weak, self.options.strong):
            if named is not None:
                check_known(named, [*keys, BASE])
        if self.router is not None:
            self.router.prepare(experts)

    @staticmethod
    def _weighted(key: str) -> WeightedExperts:
        return () if key == BASE else ((key, 1.0),)


def _has_to_learn(options: CascadeOptions) -> bool:
    return bool(getattr(plugins.load("router", str(options.asked)), "learned", False))


def _inner_state(state: RouterState) -> RouterState | None:
    facts = state.facts.get("inner")
    if not facts:
        return None
    tensors = {k.removeprefix(_PREFIX): v for k, v in state.tensors.items() if k.startswith(_PREFIX)}
    return RouterState(tensors, facts)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Corrupt(f"the state of router {NAME} has no threshold", hint="train the router again")
    return float(value)


def _score(route: Route) -> float:
    """The router's score of the route's first expert; of one that it does not list, the lowest that it lists. NaN
    where the base is to answer."""
    if not route.candidates or not route.experts:
        return math.nan
    first = route.experts[0][0]
    listed = (candidate.score for candidate in route.candidates if candidate.expert == first)
    return next(listed, route.candidates[-1].score)


def _expected(experts: WeightedExperts, scores: Floats64, subjects: Sequence[str]) -> float:
    """The mean observed score of a weighted set, which was not observed as such."""
    if not experts:
        return float(scores[subjects.index(BASE)])
    return sum(weight * float(scores[subjects.index(key)]) for key, weight in experts)


def _names(experts: WeightedExperts) -> set[str]:
    return {key for key, _ in experts}


def _named(experts: WeightedExperts) -> str:
    return " + ".join(key for key, _ in experts) or "the base"


PLUGIN = CascadeRouter
