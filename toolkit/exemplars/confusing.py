"""The shots whose questions are most confusing first: by how little their conditions bear on what is asked."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.embedding import open_embedder
from xpert.errors import BadInput
from xpert.overlap import same_text_key
from xpert.protocols import Embedder, Exemplars, ExemplarTask, Floats

__all__ = ["PLUGIN", "conditions_and_question"]

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])|\n+")
_QUANTITY = re.compile(
    r"\d[\d,.]*|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|"
    r"seventy|eighty|ninety|hundred|thousand|half|twice|dozen)\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r",\s+")


@dataclass(frozen=True)
class ConfusingOptions(Config):
    by: str = option(
        "relevance",
        "what confuses: conditions that have little to do with the question (relevance, the published rule), or what "
        "the base model finds in the right answer, given the question: its mean loss (loss) or the mean entropy of "
        "its predictions (entropy); the last two need --base",
        choices=("relevance", "loss", "entropy"),
    )


class Confusing:
    """The `count` most confusing shots, the most confusing one first.

    by=relevance is the rule of I3C-Select. A prompt's last sentence is its question q, the others are its conditions
    c_1..c_n, and a condition with several quantities is cut at its commas; confusion is the inverse of the mean cosine
    of the c_i with q, by the embedder, which is fitted on these sentences. We rank by that mean itself, least first:
    the same order where it is positive, and a sound one where it is not. The released code holds no scoring, but its
    eight demonstrations carry scores of 0.027 to 0.091 in rising order, with several conditions each: the least
    similar first, and a mean rather than a sum, which would favour prompts of one condition. Theirs are SimCSE's
    cosines. Ours besides: sentences that several shots share are the task's wording and no conditions. A prompt
    without conditions comes last; where none has any, that is an error.

    by=loss and by=entropy are ours: the shots whose right answers the base model finds least likely, or predicts with
    least certainty, one pass a shot. Score of the list: mean confusion (minus the mean cosine; the loss or entropy in
    nats) of the shots that have one.
    """

    Options: ClassVar[type[Config]] = ConfusingOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = "relevance: embeds every sentence of the shots; loss, entropy: one pass of the base a shot"
    source: ClassVar[str] = (
        "Wu, Shen and Jiang 2024, Instructing LLMs to Identify and Ignore Irrelevant Conditions, arXiv:2403.12744"
    )

    def __init__(self, options: ConfusingOptions) -> None:
        self.options = options

    def order(self, task: ExemplarTask, count: int, rng: np.random.Generator) -> list[Exemplars]:
        values, reasons = self._relevance(task) if self.options.by == "relevance" else self._model(task)
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")[:count].astype(np.int64)
        known = values[order][~np.isnan(values[order])]
        return [Exemplars(order, [reasons[row] for row in order], float(known.mean()))]

    def _relevance(self, task: ExemplarTask) -> tuple[NDArray[np.float64], list[str]]:
        parts = _without_shared([conditions_and_question(shot.prompt) for shot in task.shots])
        sentences = [sentence for conditions, question in parts for sentence in (*conditions, question)]
        options = task.features.options
        embedder: Embedder = open_embedder(
            options.embedder, base=options.base, device=task.features.device, seed=task.features.seed
        )
        embedder.fit(sentences)  # an embedder of whole prompts would find all sentences of a task alike
        vectors = embedder.embed(sentences, task.features.progress)
        values = np.full(len(parts), np.nan)
        reasons = []
        start = 0
        for row, (conditions, _) in enumerate(parts):
            end = start + len(conditions)
            if conditions:
                values[row] = -round(_mean_cosine(vectors[start:end], vectors[end]), 6)
                many = f"its {len(conditions)} conditions have mean" if len(conditions) > 1 else "its condition has"
                reasons.append(f"{many} cosine {-values[row]:.3f} to its question")
            else:
                reasons.append("not scored: no conditions before its question")
            start = end + 1
        if np.isnan(values).all():
            raise BadInput(
                "no shot has a sentence of its own before its question, so none has conditions that could confuse",
                hint="use --param by=loss with --base MODEL",
            )
        return values, reasons

    def _model(self, task: ExemplarTask) -> tuple[NDArray[np.float64], list[str]]:
        from xpert.answer_losses import AnswerLosses

        options = task.features.options
        losses = AnswerLosses(task.features.base(), options.max_length)
        name = "nll" if self.options.by == "loss" else "entropy"
        found = task.features.compute(losses, np.arange(len(task.shots), dtype=np.int64))[name].astype(np.float64)
        if np.isnan(found).all():
            raise BadInput(
                f"no shot's prompt leaves room for its answer in {options.max_length:,} tokens",
                hint="raise --max-length",
            )
        said = [
            "not scored: its prompt leaves no room for its answer"
            if np.isnan(value)
            else f"{self.options.by} {value:.3f} of its answer"
            for value in found
        ]
        return found, said


def conditions_and_question(prompt: str) -> tuple[list[str], str]:
    """The sentences of a prompt: (all before the last, cut at commas where one holds several quantities; the last)."""
    found = [part.strip() for part in _SENTENCE_END.split(prompt)]
    *before, question = [part for part in found if part] or [prompt]
    conditions: list[str] = []
    for sentence in before:
        pieces = _CLAUSE_END.split(sentence) if len(_QUANTITY.findall(sentence)) > 1 else [sentence]
        conditions += [piece for piece in pieces if piece]
    return conditions, question


def _without_shared(parts: list[tuple[list[str], str]]) -> list[tuple[list[str], str]]:
    """The same less the conditions that stand in several prompts: the task's wording, which no question is about."""
    counts = Counter(text for conditions, _ in parts for text in set(map(same_text_key, conditions)))
    return [
        ([text for text in conditions if counts[same_text_key(text)] == 1], question) for conditions, question in parts
    ]


def _mean_cosine(conditions: Floats, question: Floats) -> float:
    return float((conditions @ question).mean())


PLUGIN = Confusing
