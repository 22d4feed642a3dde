"""Which of two subjects wins on a prompt, learned from observed pairs by a factorised matrix of subjects and prompts.

RouteLLM's matrix factorisation (https://arxiv.org/abs/2406.18665), on local embeddings, and for any number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput, Corrupt
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, softmax_weights
from xpert.experts.routers._factors import Factors, Training, train_factors, winning_pairs
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
from xpert.protocols import Observations, RoutableExpert, Route, RouteRequest, RouterState

__all__ = ["PLUGIN", "MfOptions", "MfRouter"]

NAME = "mf"
TRAINED = ("embedder", "dim", "constant", "ties")
"""Options that a state must agree with; those of training alone (noise, epochs, ...) are recorded in it."""


@dataclass(frozen=True)
class MfOptions(Config):
    embedder: str = option("lsa", "how prompts are embedded: lsa (fitted on those observed), minilm, st:NAME or lm")
    threshold: float = option(
        0.5, "chance to beat the base under which an expert does not answer", minimum=0, maximum=1
    )
    dim: int = option(128, "dimensions of a subject", minimum=1)
    constant: bool = option(
        True, "whether a constant stands beside the embedding, so that a subject can be better whatever is asked"
    )
    ties: str = option("none", "who wins of two equal scores: nobody, or the lower loss", choices=("none", "loss"))
    noise: float = option(0.05, "deviation of the Gaussian noise on embeddings in training", minimum=0)
    epochs: int = option(1000, "the most times training goes over the pairs, if left-out ones still gain", minimum=1)
    rate: float = option(0.003, "learning rate of Adam", minimum=1e-8)
    decay: float = option(1e-5, "weight decay", minimum=0)
    top: int = option(1, "how many experts above the threshold answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over chances that weights them, if top > 1", minimum=1e-6)
    base: str | None = option(None, "the model whose states embedder lm takes; by default the mixture's base")


class MfRouter:
    """The expert with the best chance to beat the base, sigma(s(m, q) - s(base, q)), or the base under `threshold`.

    s(m, q) = w . (norm(P_m) * (W1 e(q))). Of two subjects the one with the higher score on a prompt has won it. The
    release compares two models, with embeddings of a paid endpoint and without a constant. Training: one embedding a
    prompt, and gradient steps over the pairs (see `_factors`). A prompt costs one embedding and a product with [d, m].
    """

    Options = MfOptions
    learned: ClassVar[bool] = True

    def __init__(
        self, options: MfOptions, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None:
        self.options, self.seed = options, seed
        self.space = PromptSpace(options.embedder, base=options.base, seed=seed, device=device)
        self.subjects: tuple[str, ...] = ()
        self.factors: Factors | None = None
        self.keys: list[str] = []
        self.directions: Floats64 | None = None
        if state is not None:
            self._restore(state)

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        """Raises BadInput for observations that do not fit the experts, or in which nobody beats anybody."""
        observed = canonical(NAME, experts, seen)
        given = self.options
        losses = finite(observed, "losses") if given.ties == "loss" else None
        pairs = winning_pairs(finite(observed, "scores"), losses, seed=self.seed)
        if not len(pairs):
            raise BadInput(
                "on no observed prompt does one subject beat another, which is what router mf learns from",
                hint="observe other prompts, or use ties=loss",
            )
        rows = self.space.fit(observed.prompts)
        self.factors, report = train_factors(
            rows,
            pairs,
            len(observed.subjects),
            Training(given.dim, given.constant, given.noise, given.epochs, given.rate, given.decay, self.seed),
        )
        self.subjects = observed.subjects
        self.prepare(experts)
        facts = state_facts(NAME, given, TRAINED, self.subjects, embedder=self.space.facts(), training=report)
        return RouterState({**self.factors.tensors(), **self.space.tensors()}, facts)

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that was not observed."""
        if self.factors is None:
            raise untrained(NAME)
        places: NDArray[np.int64] = places_of(NAME, experts, self.subjects)
        self.keys = [self.subjects[place] for place in places]
        # s is linear in e(q), so that an expert's lead over the base is one direction of the embedding space.
        all_of_them = self.factors.directions()
        self.directions = all_of_them[places] - all_of_them[-1]

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if self.factors is None or self.directions is None:
            raise untrained(NAME)
        if not requests:
            return []
        if not self.keys:
            return [Route((), (), "mf: the mixture has no experts; the base answers")] * len(requests)
        leads = self.factors.inputs(self.space.embed([request.prompt for request in requests])) @ self.directions.T
        # Rounded, since a product's last bits depend on the size of the batch and routes must not.
        return [self._route(row) for row in np.round(0.5 * (1 + np.tanh(leads / 2)), 6)]

    def _route(self, chances: Floats64) -> Route:
        candidates = candidates_at(best_places(chances, max(SHOWN, self.options.top)), self.keys, chances)
        first = candidates[0]
        reason = f"{first.expert} beats the base with probability {first.score:.2f}"
        if first.score < self.options.threshold:
            return Route((), candidates, f"{reason}, under {self.options.threshold:.2f}; the base answers")
        if len(candidates) > 1:
            reason += f"; next {candidates[1].expert}, {candidates[1].score:.2f}"
        chosen = [c for c in candidates[: self.options.top] if c.score >= self.options.threshold]
        return Route(softmax_weights(chosen, temperature=self.options.temperature), candidates, reason)

    def _restore(self, state: RouterState) -> None:
        self.subjects = check_state(NAME, self.options, TRAINED, state, Factors.names())
        self.space.restore(state)
        self.factors = Factors.restored(state.tensors, constant=self.options.constant)
        if len(self.factors.subjects) != len(self.subjects):
            raise Corrupt(f"the factors in the state of router {NAME} do not fit its subjects")


PLUGIN = MfRouter
