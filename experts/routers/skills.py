"""Experts recruited by what they got right on the prompt's keywords. Nothing is trained.

Symbolic-MoE (Chen et al. 2025, arXiv:2503.05641): an expert's profile says for each keyword how many items it answered
right and wrong; a prompt's experts are those whose profile on its keywords is best, times how good they are overall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, number_of, shuffled
from xpert.experts.routers._keyword_votes import KeywordVotes
from xpert.experts.routers._prompt_keywords import Keyword, PromptKeywords
from xpert.protocols import Candidate, RoutableExpert, Route, RouteRequest, WeightedExperts

if TYPE_CHECKING:
    from xpert.judges import Judge

__all__ = ["PLUGIN", "SkillsOptions", "SkillsRouter"]

_TOLD = 5
"""Recruited experts whose votes the reason tells."""


@dataclass(frozen=True)
class SkillsOptions(Config):
    keywords: str = option(
        "terms",
        "a prompt's keywords: the profiles' terms that it holds, those nearest to it by an embedder, or those that a "
        "language model names",
        choices=("terms", "embed", "model"),
    )
    embedder: str | None = option(
        None,
        "minilm, st:NAME or lm: with keywords=embed (there minilm if none is named), and with keywords=model for what "
        "the model calls by other names than the profiles",
    )
    threshold: float = option(0.5, "least cosine of an embedder's match", minimum=-1, maximum=1)
    model: str | None = option(
        None, "who names keywords: folder, hub name or http://HOST:PORT/v1#MODEL; by default the mixture's base"
    )
    k: int = option(3, "how many experts are recruited", minimum=1)
    draw: str = option("top", "the k best, or k drawn by weight as published", choices=("top", "sample"))
    replacement: bool = option(
        False, "with draw=sample, an expert may be drawn again and then weighs more, as published"
    )
    tau: float = option(0.5, "of the exponent 1/tau on what an expert got right over all", minimum=0.01)
    fallback: str = option(
        "global",
        "who answers where no keyword is known: the best over all, or the base",
        choices=("global", "base"),
    )
    base: str | None = option(None, "the base model, for embedder lm and as model; by default the mixture's base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replacement and self.draw != "sample":
            raise BadInput("replacement=true says how experts are drawn", hint="add draw=sample")
        if self.keywords == "terms" and self.embedder is not None:
            raise BadInput("keywords=terms uses no embedder", hint="choose keywords=embed, or leave embedder out")
        if self.keywords != "model" and self.model is not None:
            raise BadInput(f"keywords={self.keywords} asks no model", hint="choose keywords=model, or leave model out")


class SkillsRouter:
    """weight = local+ x global, of the k experts recruited by it.

    local: the sum over the prompt's keywords of (right - wrong) / (items + 5). global: (G - min G + 1)^(1/tau), G being
    (right - wrong) / (items + 5) over all keywords of an expert's profile, shown as a share of the best expert's.

    As published, but for these. Votes are shares that few items shrink, rather than counts, as experts may be profiled
    on suites of different lengths. G is shifted always, not only where one is negative: a share near zero would shut
    an expert out. k different experts, the best ones, unless draw and replacement say otherwise. local+ is what is
    above zero; where nothing is, as with small models that get most of a suite wrong, local is shifted by its minimum,
    so that the least wrong is recruited. Where no keyword is known, or all experts are equally bad on those that are,
    those with the best global answer (fallback=global, candidates then scoring global - 1, under all that are known for
    something) or the base does (fallback=base); the release draws three experts at random.

    Experts without a profile by keywords are routed to by assumed votes, see `KeywordVotes`. Draws depend on seed,
    request id and expert alone. A prompt costs O(words + experts), and with embedder or model what these cost.
    """

    Options = SkillsOptions
    remedy = "profile it with `xpert profile EXPERT SUITE --keywords terms`"

    def __init__(self, options: SkillsOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options, self._seed, self._device = options, seed, device
        self._keys: list[str] = []

    @staticmethod
    def lacking(options: SkillsOptions, experts: Sequence[RoutableExpert], *, device: str = "auto") -> dict[str, str]:
        """What each expert lacks that nothing is known of."""
        return {
            expert.key: "keyword votes, skills or exemplars"
            for expert in experts
            if not (expert.keyword_votes or expert.skills or expert.skill_scores)
            and not any(text.strip() for text in expert.exemplars)
        }

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that nothing is known of, and what opening embedder or model raises."""
        for key, what in self.lacking(self.options, experts).items():
            raise BadInput(f"expert {key!r} has no {what}, which router skills needs", hint=self.remedy)
        ordered = sorted(experts, key=lambda expert: expert.key)
        self._keys = [expert.key for expert in ordered]
        if not ordered:
            return
        self.votes = KeywordVotes(ordered)
        raised = (self.votes.standing - self.votes.standing.min() + 1) ** (1 / self.options.tau)
        self._global: NDArray[np.float64] = raised / raised.max()
        self._numbers = np.array([number_of(key) for key in self._keys], np.uint64)
        self._find = self._finder()
        self._judge = self._opened_judge()

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if not self._keys:
            return [Route((), (), "skills: the mixture has no experts; the base answers")] * len(requests)
        keywords = self._keywords([request.prompt for request in requests])
        return [self._route(request.id, found) for request, found in zip(requests, keywords, strict=True)]

    def _finder(self) -> PromptKeywords:
        spec = self.options.embedder or ("minilm" if self.options.keywords == "embed" else None)
        space = None
        if spec is not None:
            from xpert.experts.prototypes import open_space

            space = open_space(spec, base=self.options.base, device=self._device)
        return PromptKeywords(self.votes.items, space, self.options.threshold)

    def _opened_judge(self) -> Judge | None:
        if self.options.keywords != "model":
            return None
        from xpert.judges import open_judge

        model = self.options.model or self.options.base
        if model is None:
            raise BadInput("keywords=model needs a model", hint="name one by model=MODEL")
        return open_judge(model, device=self._device)

    def _keywords(self, prompts: Sequence[str]) -> list[list[Keyword]]:
        if self.options.keywords == "embed":
            return self._find.near(prompts) if prompts else []
        if self._judge is None:
            return [self._find.in_text(prompt) for prompt in prompts]
        from xpert.experts.model_keywords import agreed_keywords, keyword_questions

        replies = self._judge.ask(keyword_questions(prompts), "naming keywords")
        return [self._find.like(names) for names in agreed_keywords(replies)]

    def _route(self, request_id: str, keywords: Sequence[Keyword]) -> Route:
        names = [keyword.name for keyword in keywords]
        local = self.votes.local(names)
        shifted = local if (local > 0).any() else local - local.min()
        weights = np.maximum(shifted, 0) * self._global
        known = f"keywords {', '.join(map(str, keywords))}" if keywords else "no keyword of the profiles in the prompt"
        scores, shown = weights, max(SHOWN, self.options.k)
        if not weights.any():
            nobody = f"{known}; no expert is better than another on them" if keywords else known
            if self.options.fallback == "base":
                candidates = candidates_at(best_places(scores, shown), self._keys, scores)
                return Route((), candidates, f"skills: {nobody}; the base answers")
            known, weights, scores = f"{nobody}; the best over all", self._global, self._global - 1
        counts = self._recruited(request_id, weights)
        share = np.array([weights[place] if self.options.draw == "top" else n for place, n in counts.items()])
        places = np.array(list(counts))
        order = np.lexsort((places, -share))
        experts: WeightedExperts = tuple((self._keys[places[i]], float(share[i] / share.sum())) for i in order)
        told = [self._told(int(places[i]), names, local[places[i]], counts[int(places[i])]) for i in order[:_TOLD]]
        more = f"; and {len(order) - _TOLD} more" if len(order) > _TOLD else ""
        return Route(experts, self._candidates(scores, places, shown), f"skills: {known}: {'; '.join(told)}{more}")

    def _recruited(self, request_id: str, weights: NDArray[np.float64]) -> Counter[int]:
        """Place -> how often it is recruited, of the places with a weight above zero."""
        options = self.options
        able = np.flatnonzero(weights > 0)
        if options.draw == "top":
            return Counter(able[best_places(weights[able], options.k)].tolist())
        # The largest of log w + Gumbel noise is a draw by w, and the k largest are k draws without replacement.
        own = np.uint64(number_of(self._seed, request_id))
        numbers = shuffled(self._numbers[able] ^ own)
        logs = np.log(weights[able])
        if not options.replacement:
            return Counter(able[best_places(logs + _gumbel(numbers), options.k)].tolist())
        rounds = (numbers ^ np.uint64(number_of("round", turn)) for turn in range(options.k))
        return Counter(int(able[best_places(logs + _gumbel(shuffled(turn)), 1)[0]]) for turn in rounds)

    def _candidates(self, scores: NDArray[np.float64], chosen: NDArray[np.int64], shown: int) -> tuple[Candidate, ...]:
        """The best, and those that were drawn without being among them."""
        listed = np.union1d(best_places(scores, shown), chosen)
        return candidates_at(listed[best_places(scores[listed], len(listed))], self._keys, scores)

    def _told(self, place: int, names: Sequence[str], local: float, times: int) -> str:
        votes = self.votes.of_expert[place]
        each = ", ".join(f"{name} {votes[name].value:+.2f} ({votes[name]})" for name in names if name in votes)
        drawn = f", drawn {times} of {self.options.k} times" if self.options.replacement else ""
        both = f"local {local:.2f}, global {self._global[place]:.2f}{drawn}"
        return f"{self._keys[place]} {each}, {both}" if each else f"{self._keys[place]} {both}"


def _gumbel(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Evenly spread numbers -> draws from the standard Gumbel distribution."""
    even = ((numbers >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    found: NDArray[np.float64] = -np.log(-np.log(even))
    return found


PLUGIN = SkillsRouter
