"""Predicts how every expert and the base would do on a prompt, and takes the best once their costs are paid.

Tryage (https://arxiv.org/abs/2308.11601), on frozen local embeddings in place of a fine-tuned BERT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput, Corrupt, unknown
from xpert.experts.router_learning.cost_front import FrontPoint, cost_front
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, softmax_weights
from xpert.experts.routers._flags import Wishes, read_flags
from xpert.experts.routers._learning import (
    Floats64,
    canonical,
    check_state,
    finite,
    places_of,
    state_facts,
    untrained,
)
from xpert.experts.routers._prompt_space import PromptSpace
from xpert.experts.routers._regression import LeftOut, Mlp, Ridge
from xpert.protocols import Observations, RoutableExpert, Route, RouteRequest, RouterState

__all__ = ["PLUGIN", "TryageOptions", "TryageRouter"]

NAME = "tryage"
TRAINED = ("embedder", "predict", "head")
"""Options that training depends on; the others may be changed without training again."""

_SHOWN_PROMPTS = 512
"""Training prompts, evenly spread, whose left-out predictions a state keeps to show what quality costs."""
_UNITS = {"size": "parameters", "seconds": "seconds"}
"""cost -> its name among an expert's costs."""
_LEFT_OUT = ("left_out.predicted", "left_out.observed")


@dataclass(frozen=True)
class TryageOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on those observed), minilm, st:NAME or lm")
    predict: str = option(
        "loss",
        "what is predicted: nats per token of the reference answer, or the score of the subject's own",
        choices=("loss", "score"),
    )
    head: str = option("ridge", "what predicts it: a ridge regression or a small network", choices=("ridge", "mlp"))
    width: int = option(64, "hidden units, with head mlp", minimum=1)
    epochs: int = option(200, "the most times the network goes over the prompts, with head mlp", minimum=1)
    size_weight: float = option(
        0.0, "what the most parameters among the experts cost, in units of what is predicted", minimum=0
    )
    seconds_weight: float = option(0.0, "what the most seconds an item cost, in the same units", minimum=0)
    flags: bool = option(False, "whether prompts may set these weights, as with [Flag: smallest model]")
    margin: float = option(0.0, "how much better than the base an expert must be, costs included", minimum=0)
    top: int = option(1, "how many experts that are better than the base answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over advantages that weights them, if top > 1", minimum=1e-6)
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


class TryageRouter:
    """argmin over experts and base of L(x, m) + size_weight * size(m) + seconds_weight * seconds(m).

    L is the predicted loss, or 1 - the predicted score. Size and seconds are shares of the most among the experts; the
    base adds no parameters, and as an adapter only adds work, it takes the least seconds of any expert. A candidate's
    score is how far its objective lies under the base's. With `flags`, a prompt may say `[Flag: smallest model]`,
    `small model`, `fastest model`, `fast model` or `best model`, which set the weights for it alone (see `_flags`);
    the router does not look at the words of a flag, though the model still reads them. Training: one embedding a
    prompt and one regression. A prompt costs one embedding and a product with [d, m] (mlp: [d, width], [width, m]).
    """

    Options = TryageOptions
    learned: ClassVar[bool] = True

    def __init__(
        self, options: TryageOptions, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None:
        self.options, self.seed = options, seed
        self.space = PromptSpace(options.embedder, base=options.base, seed=seed, device=device)
        self.subjects: tuple[str, ...] = ()
        self.head: Ridge | Mlp | None = None
        self.keys: list[str] = []
        self.places: NDArray[np.int64] | None = None
        self.costs: dict[str, Floats64] = {}
        self.left_out: tuple[Floats64, Floats64] = (np.zeros((0, 0)), np.zeros((0, 0)))
        if state is not None:
            self._restore(state)

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        """Raises BadInput for observations that do not fit the experts, or lack a number that is to be predicted."""
        observed = canonical(NAME, experts, seen)
        rows = self.space.fit([self._read(request).prompt for request in observed.requests])
        table = finite(observed, "losses" if self.options.predict == "loss" else "scores")
        given = self.options
        left_out: LeftOut
        if given.head == "ridge":
            self.head, left_out = Ridge.fit(rows, table)
        else:
            self.head, left_out = Mlp.fit(rows, table, width=given.width, epochs=given.epochs, seed=self.seed)
        some = np.unique(np.linspace(0, max(0, len(left_out.rows) - 1), _SHOWN_PROMPTS).round().astype(int))
        some = some[: len(left_out.rows)]
        kept = (left_out.predicted[some], table[left_out.rows[some]])
        seen_losses = {name: part.astype(np.float32) for name, part in zip(_LEFT_OUT, kept, strict=True)}
        self._know_left_out(seen_losses)
        self.subjects = observed.subjects
        self.prepare(experts)
        facts = state_facts(
            NAME, given, TRAINED, self.subjects, embedder=self.space.facts(), training=self.head.facts()
        )
        return RouterState({**self.head.tensors(), **seen_losses, **self.space.tensors()}, facts)

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that was not observed, or whose cost has a weight and is not known."""
        if self.head is None:
            raise untrained(NAME)
        places = places_of(NAME, experts, self.subjects)
        self.places = np.r_[places, len(self.subjects) - 1]
        self.keys = [self.subjects[place] for place in places]
        known = sorted(experts, key=lambda expert: expert.key)
        weights = {"size": self.options.size_weight, "seconds": self.options.seconds_weight}
        self.costs = {}
        for cost, name in _UNITS.items():
            lacking = [expert.key for expert in known if name not in expert.costs]
            if lacking and weights[cost]:
                mending = "profile it" if cost == "seconds" else "leave out size-weight"
                raise BadInput(
                    f"the {name} of expert {lacking[0]!r} are not known, and {cost}-weight counts them", hint=mending
                )
            if known and not lacking:
                self.costs[cost] = _shares([expert.costs[name] for expert in known], free_base=cost == "size")

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if not requests:
            return []
        read = [self._read(request) for request in requests]
        predicted = self._predicted([wishes.prompt for wishes in read])
        return [self._route(row, wishes) for row, wishes in zip(predicted, read, strict=True)]

    def pareto(self) -> list[dict[str, float]]:
        """`front` on training prompts as they were predicted by fits without them, as plain figures: the weight, the
        mean loss or score, and the mean cost as a share of the most. Only of costs that are known."""
        if self.places is None or not len(self.left_out[0]):
            return []
        predicted, observed = (self._as_losses(part[:, self.places]) for part in self.left_out)
        found = []
        for cost, shares in self.costs.items():
            for point in cost_front(predicted, observed, shares):
                quality = point.loss if self.options.predict == "loss" else 1 - point.loss
                found.append({f"{cost}_weight": point.weight, self.options.predict: quality, cost: point.cost})
        return found

    def front(self, seen: Observations, *, cost: str = "size", points: int = 64) -> list[FrontPoint]:
        """What quality costs on observed prompts: mean loss (or 1 - score) and mean cost as the weight of `cost` (size
        or seconds, as shares of the most) grows; see `cost_front`. `shares` follow the sorted experts, then the base.

        The observations should not be those it was trained on. Raises BadInput where the cost is not known, or an
        expert of the mixture was not observed.
        """
        if cost not in _UNITS:
            raise unknown("cost", cost, _UNITS)
        if cost not in self.costs:
            raise BadInput(f"the {_UNITS[cost]} of the experts are not known", hint="take size, or profile all experts")
        observed = canonical(NAME, [RoutableExpert(key, ()) for key in self.keys], seen)
        table = self._as_losses(finite(observed, "losses" if self.options.predict == "loss" else "scores"))
        predicted = self._predicted([self._read(request).prompt for request in observed.requests])
        return cost_front(predicted, table, self.costs[cost], points=points)

    def _predicted(self, prompts: Sequence[str]) -> Floats64:
        """[n, experts + base]: predicted losses, or 1 - predicted scores."""
        if self.head is None or self.places is None:
            raise untrained(NAME)
        found = self.head.predict(self.space.embed(prompts))[:, self.places]
        # Rounded, since a product's last bits depend on the size of the batch and routes must not.
        return np.round(self._as_losses(found), 6)

    def _as_losses(self, table: Floats64) -> Floats64:
        return table if self.options.predict == "loss" else 1 - table

    def _read(self, request: RouteRequest) -> Wishes:
        return read_flags(request.prompt) if self.options.flags else Wishes(request.prompt)

    def _route(self, predicted: Floats64, wishes: Wishes) -> Route:
        weights = {"size": self.options.size_weight, "seconds": self.options.seconds_weight, **wishes.weights}
        objective = predicted
        for cost, weight in weights.items():
            if weight and cost in self.costs:
                objective = objective + weight * self.costs[cost]
        advantage = np.round(objective[-1] - objective[:-1], 6)
        candidates = candidates_at(best_places(advantage, max(SHOWN, self.options.top)), self.keys, advantage)
        said = "".join(f"; flag {flag!r}" for flag in wishes.known)
        said += "".join(f"; unknown flag {flag!r}" for flag in wishes.unknown)
        lacking = [cost for cost, weight in wishes.weights.items() if weight and cost not in self.costs]
        said += "".join(f", which changes nothing: the {_UNITS[cost]} of the experts are not known" for cost in lacking)
        if not candidates:
            return Route((), (), f"tryage: the mixture has no experts; the base answers{said}")
        place = int(np.argmax(advantage))  # keys are sorted: of equals the first
        told = self._told(self.keys[place], place, predicted, weights) + ", base " + self._value(predicted[-1])
        if not advantage[place] > self.options.margin:
            told += f"; not better by more than {self.options.margin:g}, the base answers"
            return Route((), candidates, told + said)
        chosen = [c for c in candidates[: self.options.top] if c.score > self.options.margin]
        return Route(softmax_weights(chosen, temperature=self.options.temperature), candidates, told + said)

    def _told(self, key: str, place: int, predicted: Floats64, weights: dict[str, float]) -> str:
        paid = "".join(
            f" + {cost} {self.costs[cost][place]:.2f} * {weight:g}"
            for cost, weight in weights.items()
            if weight and cost in self.costs
        )
        return f"predicted {self.options.predict} of {key} {self._value(predicted[place])}{paid}"

    def _value(self, predicted: float) -> str:
        return f"{predicted if self.options.predict == 'loss' else 1 - predicted:.3f}"

    def _restore(self, state: RouterState) -> None:
        kind = Ridge if self.options.head == "ridge" else Mlp
        parts = ("weights", "bias") if kind is Ridge else ("hidden", "hidden_bias", "out", "out_bias")
        self.subjects = check_state(NAME, self.options, TRAINED, state, [*(f"head.{p}" for p in parts), *_LEFT_OUT])
        self.space.restore(state)
        self.head = kind.restored(state.tensors)
        self._know_left_out(state.tensors)
        if state.tensors[f"head.{parts[-1]}"].shape != (len(self.subjects),):
            raise Corrupt(f"the head in the state of router {NAME} does not fit its subjects")

    def _know_left_out(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        predicted, observed = (np.asarray(tensors[name], np.float64) for name in _LEFT_OUT)
        self.left_out = (predicted, observed)


def _shares(values: Sequence[float], *, free_base: bool) -> Floats64:
    """Of the largest value, and at the end the base's: 0, or the least of them."""
    known = np.array([*values, 0.0 if free_base else min(values)])
    most = float(known.max())
    return known / most if most > 0 else known * 0


PLUGIN = TryageRouter
