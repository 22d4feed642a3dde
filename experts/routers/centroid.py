"""Nearest skill over embedded exemplars: adding or removing an expert trains nothing.

First form of RouterRetriever (https://arxiv.org/abs/2409.02685): an expert's pilots are the centroids of its
exemplar prompts, one per skill. Exemplars of one skill often lie in several places, where their mean describes none
of them, so by default a skill is as near as its three nearest exemplars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, softmax_weights
from xpert.experts.routers._fixed_space import embedder_of, identity_of
from xpert.experts.routers._skill_space import PromptSpace, SkillGroup, SkillSpace, groups_of
from xpert.experts.routers._skill_thresholds import calibrated
from xpert.protocols import Floats, RoutableExpert, Route, RouteRequest

__all__ = ["PLUGIN", "CentroidOptions", "CentroidRouter"]

DIGITS = 5
"""Of a score: what lies below is rounding of an embedder's batches."""
_BATCH = 256
_SLACK = 3e-5
"""Float32 scores nearer than this to the last candidate's are looked at again in float64."""


@dataclass(frozen=True)
class CentroidOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on the exemplars), minilm, st:NAME or lm")
    mode: str = option(
        "nearest", "similarity to a skill's nearest exemplars, or to its centroid", choices=("nearest", "centroid")
    )
    top: int = option(1, "how many experts answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over cosines that weights them, if top > 1", minimum=1e-6)
    threshold: float | None = option(
        None,
        "cosine under which the base answers; by default from the exemplars, see strictness",
        minimum=-1,
        maximum=1,
    )
    reject: float = option(
        0.02,
        "share of a skill's exemplars, and of the others', that may lie beyond the bounds its threshold is set between",
        minimum=0,
        maximum=1,
    )
    strictness: float = option(
        0.5,
        "where between others (0) and its own (1) the threshold lies: more leaves more to the base",
        minimum=0,
        maximum=1,
    )
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


class CentroidRouter:
    """cosine(prompt, skill) -> the experts of the nearest skills, or the base model below the threshold.

    A skill's score is the cosine to the mean of its exemplars (mode centroid) or the mean cosine to its three nearest
    exemplars (mode nearest, for experts whose exemplars lie in several places); an expert's score is its best
    skill's. With lsa, which is fitted on the exemplars, the cosine counts the prompt's unknown words too (see
    `Familiarity`).

    An expert without exemplars is reached by the prototypes of its card, if they are of the embedder in use: a skill
    is then as near as the nearest of its centroids, in either mode. Its threshold is found without own exemplars (see
    `calibrated`). Where such an expert is in a mixture whose embedder is lm, all are compared by the states as they
    are (`raw`), as its prototypes were made.

    Preparing embeds all exemplars, and with lsa fits it 1 + FOLDS times. A prompt costs one embedding and one product
    with [groups, d] or [exemplars, d]; its route is the same in any batch, as far as its embedding is, which lsa's is
    to the bit. A route lists the `SHOWN` best experts.
    """

    Options = CentroidOptions
    remedy = "import it with --exemplars, train it with shots, or mix with --router fixed"

    def __init__(self, options: CentroidOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options, self._seed, self._device = options, seed, device
        plugins.load("embedder", options.embedder.partition(":")[0])
        self.groups: list[SkillGroup] = []
        self.thresholds: NDArray[np.float64] = np.zeros(0)
        self._prompts: PromptSpace | None = None

    @staticmethod
    def lacking(options: CentroidOptions, experts: Sequence[RoutableExpert], *, device: str = "auto") -> dict[str, str]:
        """What each expert lacks that could never be reached. Opens the embedder only if prototypes may serve."""
        without = [expert for expert in experts if not any(text.strip() for text in expert.exemplars)]
        prototypes = any(expert.prototypes for expert in without)
        identity = identity_of(options.embedder, base=options.base, device=device) if prototypes else None
        return {
            expert.key: f"exemplars{_of_others(expert, options.embedder)}"
            for expert in without
            if identity not in expert.prototypes
        }

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that could never be reached, see `lacking`."""
        for key, what in self.lacking(self.options, experts, device=self._device).items():
            raise BadInput(
                f"expert {key!r} has no {what}, which router centroid needs",
                hint=self.remedy,
            )
        # In an order of their own: the axes of a fitted space depend on the order of its texts, and routes must not.
        ordered = sorted(experts, key=lambda expert: expert.key)
        by_prototypes = any(not any(text.strip() for text in expert.exemplars) for expert in ordered)
        identity, new_embedder = embedder_of(
            self.options.embedder,
            base=self.options.base,
            device=self._device,
            seed=self._seed,
            raw=by_prototypes,
        )
        fitted = self.options.embedder == "lsa"
        self.groups = [group for expert in ordered for group in groups_of(expert, identity)]
        self._prompts = None
        if not self.groups:
            return

        def refit() -> PromptSpace:
            return PromptSpace(new_embedder(), fitted=fitted)

        space = refit()
        texts = [text for group in self.groups for text in group.texts]
        vectors = space.learn(texts) if texts else np.zeros((0, 0), np.float32)
        self._space = SkillSpace(self.groups, vectors, self.options.mode)
        self._keys = [expert.key for expert in ordered]
        owners = np.array([group.expert for group in self.groups])
        self._first = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        given = self.options.threshold
        if given is not None:
            self.thresholds = np.full(len(self.groups), given)
        else:
            self.thresholds = calibrated(
                self.groups,
                vectors,
                self.options.mode,
                refit if fitted else None,
                reject=self.options.reject,
                strictness=self.options.strictness,
            )
        self._prompts = space

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self._prompts is None:
            return [Route((), (), "centroid: the mixture has no experts; the base answers")] * len(requests)
        routes = []
        for start in range(0, len(requests), _BATCH):
            prompts = self._prompts.prompts([request.prompt for request in requests[start : start + _BATCH]])
            scores = self._space.scores(prompts)
            routes += [self._route(prompt, row) for prompt, row in zip(prompts, scores, strict=True)]
        return routes

    def _route(self, prompt: Floats, rough: Floats) -> Route:
        places, scores, nearest = self._best(prompt, rough)
        candidates = candidates_at(places, self._keys, scores)
        labels = [self.groups[nearest[place]].label for place in places[:2]]
        first = candidates[0]
        reason = f"nearest skill {labels[0]!r} of {first.expert}, cosine {first.score:.2f}"
        threshold = self.thresholds[nearest[places[0]]]
        if first.score < threshold:
            # Figures that round to the same would contradict the word between them.
            close = f"{first.score:.2f}" == f"{threshold:.2f}"
            bound = f"{threshold:.2f} by {threshold - first.score:.1g}" if close else f"{threshold:.2f}"
            return Route((), candidates, f"{reason}, is under its threshold {bound}; the base answers")
        if len(candidates) > 1:
            second = candidates[1]
            reason += f"; next {labels[1]!r} of {second.expert}, {second.score:.2f}"
        chosen = [
            candidate
            for candidate, place in zip(candidates[: self.options.top], places.tolist(), strict=False)
            if candidate.score >= self.thresholds[nearest[place]]
        ]
        return Route(softmax_weights(chosen, temperature=self.options.temperature), candidates, reason)

    def _best(self, prompt: Floats, rough: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """(places of the best experts; the scores of all places, -inf but there; each place's nearest group).

        The last bits of a product depend on the size of the batch, and routes must not: float32 scores say who may be
        among the best, and these are scored again in float64 and rounded.
        """
        most = max(SHOWN, self.options.top)
        best = np.maximum.reduceat(rough, self._first)
        scores = np.full(len(best), -np.inf)
        nearest = self._first.copy()
        if not prompt.any():
            scores[:] = 0
            return best_places(scores, most), scores, nearest
        least = np.partition(best, len(best) - most)[len(best) - most] if most < len(best) else best.min()
        ends = np.concatenate([self._first[1:], [len(rough)]])
        per_group = np.repeat(best, ends - self._first)
        groups = np.flatnonzero((rough >= per_group - _SLACK) & (per_group >= least - _SLACK))
        owners = np.searchsorted(self._first, groups, side="right") - 1
        exact = np.round(self._space.exact(prompt, groups), DIGITS) + 0.0  # no -0
        # Backwards and by score, so that the best of an expert's groups is written last, of equal ones the first.
        for at in np.lexsort((-groups, exact)):
            scores[owners[at]], nearest[owners[at]] = exact[at], groups[at]
        return best_places(scores, most), scores, nearest


def _of_others(expert: RoutableExpert, embedder: str) -> str:
    """What to say of prototypes that an expert has, but not of the embedder in use."""
    if not expert.prototypes:
        return ""
    return f" and no prototypes of embedder {embedder} (it has those of {', '.join(sorted(expert.prototypes))})"


PLUGIN = CentroidRouter
