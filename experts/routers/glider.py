"""Experts whose description lies near what the prompt asks for. Nothing is trained.

The global term of GLIDER (Li et al. 2024, arXiv:2410.07172): a language model describes the prompt's task in words,
and the descriptions of task and expert are compared in an embedder's space. Its local term, a choice at every token, is
the gate of the same name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xpert import plugins
from xpert.config import Config, option
from xpert.embedding import open_embedder
from xpert.errors import BadInput
from xpert.experts.routers._choice import SHOWN, best_places, candidates_at, softmax_weights
from xpert.experts.routers._skill_space import PromptSpace
from xpert.protocols import Floats, RoutableExpert, Route, RouteRequest

if TYPE_CHECKING:
    from xpert.judges import Judge

__all__ = ["PLUGIN", "GliderOptions", "GliderRouter", "description_of"]

FEW = 3
"""Exemplars in a description that is made of them, as many as the published prompt shows."""
CORPUS = 8
"""Exemplars of each expert that lsa is fitted on beside the descriptions."""
EXCERPT, LONGEST = 300, 300
MAX_TOKENS = 48
DIGITS = 5
_BATCH = 256
_BY_TRAINING = re.compile(r"LoRA expert(?: for .+)?, (?:trained on [\d,]+ rows|.+ in mixture \S+)\.")
"""What `xpert train` writes as the description of a card."""
TEMPLATE = """Here is a request:

{prompt}

In one short sentence, describe the task: its subject and the skills that it needs. Do not solve it.
The task is"""


@dataclass(frozen=True)
class GliderOptions(Config):
    embedder: str = option(
        "lsa", "how descriptions are embedded: lsa (fitted on them and on exemplars), minilm, st:NAME or lm"
    )
    describe: str = option(
        "prompt",
        "what is compared with the experts' descriptions: the prompt itself, or what a model says its task is",
        choices=("prompt", "model"),
    )
    model: str | None = option(
        None, "who describes tasks: folder, hub name or http://HOST:PORT/v1#MODEL; by default the mixture's base"
    )
    top: int = option(1, "how many experts answer together", minimum=1)
    temperature: float = option(0.05, "of the softmax over cosines that weights them, if top > 1", minimum=1e-6)
    threshold: float = option(0.0, "the base answers where no cosine is above this", minimum=-1, maximum=1)
    base: str | None = option(None, "the base model, for embedder lm and as model; by default the mixture's base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.describe == "prompt" and self.model is not None:
            raise BadInput("describe=prompt asks no model", hint="choose describe=model, or leave model out")


class GliderRouter:
    """cosine(description of the prompt's task, description of an expert) -> the nearest experts, or the base.

    An expert's description is its card's; where that is none, or the sentence that training wrote, its skills and three
    of its exemplars (see `description_of`). The published alpha, which multiplies cosines, is 1 / temperature (100 for
    tasks like those trained on, 3 for others). With lsa the cosine counts the prompt's unknown words too (see
    `Familiarity`).

    Preparing embeds one text an expert, and with lsa fits it on eight exemplars of each as well. A prompt costs one
    embedding and a product with [experts, d]; with describe=model a reply of at most 48 tokens too, kept on disk by
    model and prompt, and the memory of that model, which is loaded beside the one that serves. Routes are the same in
    any batch, as far as the embedding is, which lsa's is to the bit. A route lists the `SHOWN` best experts.
    """

    Options = GliderOptions
    remedy = "describe it in its card, train it with shots, or mix with --router fixed"

    def __init__(self, options: GliderOptions, *, seed: int = 0, device: str = "auto") -> None:
        self.options, self._seed, self._device = options, seed, device
        plugins.load("embedder", options.embedder.partition(":")[0])
        self._keys: list[str] = []

    @staticmethod
    def lacking(options: GliderOptions, experts: Sequence[RoutableExpert], *, device: str = "auto") -> dict[str, str]:
        """What each expert lacks that nothing can be said of."""
        return {expert.key: "description, skills or exemplars" for expert in experts if not description_of(expert)}

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Raises BadInput for an expert that nothing can be said of, and what opening embedder or model raises."""
        for key, what in self.lacking(self.options, experts).items():
            raise BadInput(f"expert {key!r} has no {what}, which router glider needs", hint=self.remedy)
        ordered = sorted(experts, key=lambda expert: expert.key)
        self._keys = [expert.key for expert in ordered]
        if not ordered:
            return
        options = self.options
        embedder = open_embedder(options.embedder, base=options.base, device=self._device, seed=self._seed)
        descriptions = [description_of(expert) for expert in ordered]
        fitted = options.embedder == "lsa"
        self._space = PromptSpace(embedder, fitted=fitted)
        exemplars = [text for expert in ordered for text in expert.exemplars[:CORPUS] if text.strip()] if fitted else []
        self._vectors = self._space.learn([*descriptions, *exemplars])[: len(descriptions)]
        self._judge = self._opened_judge()

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        if not self._keys:
            return [Route((), (), "glider: the mixture has no experts; the base answers")] * len(requests)
        routes = []
        for start in range(0, len(requests), _BATCH):
            prompts = [request.prompt for request in requests[start : start + _BATCH]]
            tasks = self._described(prompts)
            vectors = self._space.prompts([task or prompt for task, prompt in zip(tasks, prompts, strict=True)])
            routes += [self._route(vector, task) for vector, task in zip(vectors, tasks, strict=True)]
        return routes

    def _route(self, vector: Floats, task: str | None) -> Route:
        # One prompt at a time, so that the product's last bits do not depend on the batch.
        scores = np.round((self._vectors @ vector).astype(np.float64), DIGITS) + 0.0
        candidates = candidates_at(best_places(scores, max(SHOWN, self.options.top)), self._keys, scores)
        first = candidates[0]
        what = self._what(task)
        reason = f"glider: {what} is nearest to the description of {first.expert}, cosine {first.score:.2f}"
        chosen = [one for one in candidates[: self.options.top] if one.score > self.options.threshold]
        if not chosen:
            return Route((), candidates, f"{reason}, which is not above {self.options.threshold:.2f}; the base answers")
        if len(candidates) > 1:
            reason += f"; next {candidates[1].expert}, {candidates[1].score:.2f}"
        return Route(softmax_weights(chosen, temperature=self.options.temperature), candidates, reason)

    def _what(self, task: str | None) -> str:
        if task:
            return f"the task {task!r}"
        return "the prompt" if self._judge is None else "the prompt (the model said nothing of its task)"

    def _opened_judge(self) -> Judge | None:
        if self.options.describe == "prompt":
            return None
        from xpert.judges import open_judge

        model = self.options.model or self.options.base
        if model is None:
            raise BadInput("describe=model needs a model", hint="name one by model=MODEL")
        return open_judge(model, device=self._device)

    def _described(self, prompts: Sequence[str]) -> list[str | None]:
        """What the model says of each prompt's task; None where none is asked, or where it says nothing."""
        if self._judge is None:
            return [None] * len(prompts)
        from xpert.judges import Question

        questions = [Question(TEMPLATE.format(prompt=_excerpt(prompt, 1500)), 0.0, MAX_TOKENS) for prompt in prompts]
        return [_sentence(reply) or None for reply in self._judge.ask(questions, "describing tasks")]


def description_of(expert: RoutableExpert) -> str:
    """The card's description; else, or where that is the sentence that training wrote, the expert's skills and its
    first three exemplars, each of at most 300 characters. Empty where it has none of these.

    Training's sentences are alike but for the names of skills: a prompt is as far from one as from the other.
    """
    description = expert.description.strip()
    if description and not _BY_TRAINING.fullmatch(description):
        return description
    skills = sorted(expert.skills or expert.skill_scores)  # a profile also names skills that the expert is bad at
    parts = [", ".join(skill.replace("_", " ") for skill in skills)] if skills else []
    exemplars = [text for text in expert.exemplars if text.strip()][:FEW]
    return "\n".join([*parts, *(_excerpt(text, EXCERPT) for text in exemplars)])


def _sentence(reply: str) -> str:
    """The reply's first lines up to an empty one, on one line."""
    return " ".join(reply.strip().split("\n\n")[0].split())[:LONGEST]


def _excerpt(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"


PLUGIN = GliderRouter
