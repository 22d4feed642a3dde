"""A classifier tells the prompt's category, and each category has its expert, chosen under a budget of parameters.

Composition of Experts (https://arxiv.org/abs/2412.01868): two stages make labels cheap, since experts are scored per
category and not per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput, Corrupt
from xpert.experts.routers._category_budget import kept_experts
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, softmax_weights
from xpert.experts.routers._classifying import Knn, Logistic
from xpert.experts.routers._learning import (
    BASE,
    Floats64,
    Observed,
    canonical,
    check_state,
    finite,
    places_of,
    state_facts,
    untrained,
)
from xpert.experts.routers._prompt_space import PromptSpace
from xpert.protocols import Candidate, Floats, Observations, RoutableExpert, Route, RouteRequest, RouterState

__all__ = ["PLUGIN", "CategoryOptions", "CategoryRouter"]

NAME = "category"
TRAINED = ("embedder", "classifier", "categories", "clusters")
"""Options that training depends on; the others may be changed without training again."""


@dataclass(frozen=True)
class CategoryOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on those observed), minilm, st:NAME or lm")
    classifier: str = option(
        "logistic", "what tells the category: logistic regression or nearest prompts", choices=("logistic", "knn")
    )
    neighbours: int = option(15, "nearest prompts that vote, with classifier knn", minimum=1)
    categories: str = option(
        "auto",
        "what a category is: the prompts' skills, clusters of prompts, or auto (skills where there are any)",
        choices=("auto", "skills", "clusters"),
    )
    clusters: str = option("auto", "how many clusters, where they are the categories: a number, or auto")
    shrinkage: float = option(
        4.0, "prompts' worth of an expert's mean over all categories that its mean in one starts from", minimum=0
    )
    budget: float | None = option(
        None,
        "the most parameters that the experts of all categories may have together, or up to 1 a share of all experts'",
        minimum=0,
    )
    margin: float = option(
        0.1,
        "difference of the two likeliest categories' probabilities under which the prompt counts as unsure",
        minimum=0,
        maximum=1,
    )
    unsure: str = option(
        "general", "who answers an unsure prompt: the best over all categories, or the base", choices=("general", BASE)
    )
    top: int = option(1, "how many experts of a category answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over scores that weights them, if top > 1", minimum=1e-6)
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


class CategoryRouter:
    """embedding -> category -> the kept expert with the best mean score in it, or the base where none is better.

    A mean over few prompts is shrunk: (sum of scores + shrinkage * mean over all prompts) / (prompts + shrinkage). The
    experts that are kept under the `budget` maximise the mean score of prompts like those observed, exactly; the base
    is at hand in every category and costs nothing. Training: one embedding a prompt and one classifier. A prompt costs
    one embedding and a product with [c, d] (knn: [prompts, d]).
    """

    Options = CategoryOptions
    learned: ClassVar[bool] = True

    def __init__(
        self, options: CategoryOptions, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None:
        self.options, self.seed = options, seed
        towards = "zero" if options.classifier == "knn" else "mean"  # nearest prompts vote with their cosines
        self.space = PromptSpace(options.embedder, base=options.base, seed=seed, device=device, towards=towards)
        self.labels: list[str] = []
        self.subjects: tuple[str, ...] = ()
        self.classifier: Logistic | Knn | None = None
        self.sums: Floats64 = np.zeros((0, 0))
        self.counts: Floats64 = np.zeros(0)
        self.plans: list[_Plan] = []
        if state is not None:
            self._restore(state)

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        """Raises BadInput for observations that do not fit the experts, or of which only some have a skill."""
        observed = canonical(NAME, experts, seen)
        rows = self.space.fit(observed.prompts)
        self.labels, places = self._categories(observed, rows)
        kind = self.options.classifier
        self.classifier = (
            Logistic.fit(rows, places, len(self.labels))
            if kind == "logistic"
            else Knn.fit(rows, places, len(self.labels), self.options.neighbours)
        )
        member = np.eye(len(self.labels))[places]
        self.sums, self.counts = member.T @ finite(observed, "scores"), member.sum(axis=0)
        self.subjects = observed.subjects
        self.prepare(experts)
        facts = state_facts(NAME, self.options, TRAINED, self.subjects, labels=self.labels, embedder=self.space.facts())
        table = {"sums": self.sums, "counts": self.counts}
        return RouterState({**table, **self.classifier.tensors(), **self.space.tensors()}, facts)

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Chooses the experts under the budget. Raises BadInput for an expert that was not observed, or whose
        parameters a budget would have to know and does not."""
        if self.classifier is None:
            raise untrained(NAME)
        places = places_of(NAME, experts, self.subjects)
        known = sorted(experts, key=lambda expert: expert.key)
        overall = self.sums.sum(axis=0) / self.counts.sum()
        pull = self.options.shrinkage
        means = (self.sums + pull * overall) / (self.counts[:, None] + pull)
        # Rounded, since sums over the same prompts in another order may differ in their last bits.
        scores, base = np.round(means[:, places], 9), np.round(means[:, -1], 9)
        kept = self._kept(known, scores - base[:, None])
        keys = [expert.key for expert in known]
        plan = [_plan(keys, row, float(of_base), kept, self.options) for row, of_base in zip(scores, base, strict=True)]
        general = np.round(overall[places], 9)
        self.plans = [*plan, _plan(keys, general, float(np.round(overall[-1], 9)), kept, self.options)]

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self.classifier is None or not self.plans:
            raise untrained(NAME)
        if not requests:
            return []
        chances = np.round(self.classifier.probabilities(self.space.embed([r.prompt for r in requests])), 6)
        return [self._route(row) for row in chances]

    def _route(self, chances: Floats64) -> Route:
        order = np.argsort(-chances, kind="stable")
        first = int(order[0])
        margin = float(chances[first] - chances[order[1]]) if len(order) > 1 else 1.0
        reason = f"category {self.labels[first]!r}, probability {chances[first]:.2f}, margin {margin:.2f}"
        if margin >= self.options.margin:
            plan = self.plans[first]
            return Route(plan.experts, plan.candidates, f"{reason}: {plan.why}")
        reason += f" under {self.options.margin:.2f}"
        if self.options.unsure == BASE:
            return Route((), self.plans[-1].candidates, f"{reason}: unsure; the base answers")
        plan = self.plans[-1]
        return Route(plan.experts, plan.candidates, f"{reason}: unsure; over all categories {plan.why}")

    def _categories(self, observed: Observed, rows: Floats) -> tuple[list[str], NDArray[np.int64]]:
        """The categories' names, sorted, and the place of each prompt's."""
        skills = [request.skill for request in observed.requests]
        without = sum(not skill for skill in skills)
        if self.options.categories == "skills" or (self.options.categories == "auto" and without < len(skills)):
            if without:
                lacking = next(request.id for request in observed.requests if not request.skill)
                raise BadInput(
                    f"{without} of {len(skills)} observed prompts have no skill, such as {lacking!r}",
                    hint="label them all, or use the parameter categories=clusters",
                )
            names = sorted({str(skill) for skill in skills})
            return names, np.array([names.index(str(skill)) for skill in skills], dtype=np.int64)
        return self._clustered(observed.prompts, rows)

    def _clustered(self, prompts: list[str], rows: Floats) -> tuple[list[str], NDArray[np.int64]]:
        from xpert.clustering import cluster, cluster_count, telling_terms

        count = cluster_count(self.options.clusters, rows)
        labels, _ = cluster(rows, count, seed=self.seed)
        terms = telling_terms(prompts, labels, count, count=3, seed=self.seed)
        names = [f"{place + 1}: {', '.join(telling) or 'no words'}" for place, telling in enumerate(terms)]
        return names, labels.astype(np.int64)

    def _kept(self, experts: Sequence[RoutableExpert], gain: Floats64) -> set[int]:
        """The places of the experts that may answer."""
        if self.options.budget is None:
            return set(range(len(experts)))
        for expert in experts:
            if "parameters" not in expert.costs:
                raise BadInput(
                    f"the parameters of expert {expert.key!r} are not known, and the budget counts them",
                    hint="leave out the parameter budget",
                )
        costs = np.array([int(expert.costs["parameters"]) for expert in experts], dtype=np.int64)
        given = self.options.budget
        limit = math.floor(given * int(costs.sum()) + 1e-6) if given <= 1 else math.floor(given)
        return set(kept_experts(gain, self.counts / self.counts.sum(), costs, limit))

    def _restore(self, state: RouterState) -> None:
        learned = ("weights", "bias") if self.options.classifier == "logistic" else ("rows", "labels", "shares")
        tensors = ["sums", "counts", *(f"classifier.{name}" for name in learned)]
        self.subjects = check_state(NAME, self.options, TRAINED, state, tensors)
        self.space.restore(state)
        self.labels = [str(label) for label in state.facts.get("labels", ())]
        self.sums, self.counts = state.tensors["sums"], state.tensors["counts"]
        if self.sums.shape != (len(self.labels), len(self.subjects)) or self.counts.shape != (len(self.labels),):
            raise Corrupt(f"the tables in the state of router {NAME} do not fit its categories")
        self.classifier = (
            Logistic.restored(state.tensors)
            if self.options.classifier == "logistic"
            else Knn.restored(state.tensors, self.options.neighbours)
        )


@dataclass(frozen=True)
class _Plan:
    """What all prompts of one category get."""

    experts: tuple[tuple[str, float], ...]
    candidates: tuple[Candidate, ...]
    why: str


def _plan(keys: Sequence[str], scores: Floats64, base: float, kept: set[int], options: CategoryOptions) -> _Plan:
    """scores [m] follow the sorted keys; candidates are all experts, and those kept that beat the base may answer."""
    usable = np.array(sorted(place for place in kept if scores[place] > base), dtype=np.int64)
    best = usable[best_places(scores[usable], options.top)]
    chosen = candidates_at(best, keys, scores)
    listed = np.union1d(best_places(scores, SHOWN), best)  # under a budget the chosen need not be among the best
    candidates = candidates_at(listed[best_places(scores[listed], len(listed))], keys, scores)
    if not chosen:
        why = "no expert is" if len(kept) == len(keys) else "no expert within the budget is"
        return _Plan((), candidates, f"{why} better than the base, {base:.2f}; the base answers")
    first = chosen[0]
    why = f"{first.expert} has the best mean score, {first.score:.2f} (base {base:.2f})"
    if first != candidates[0]:
        why += f", within the budget; {candidates[0].expert} has {candidates[0].score:.2f}"
    return _Plan(softmax_weights(chosen, temperature=options.temperature), candidates, why)


PLUGIN = CategoryRouter
