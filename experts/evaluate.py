"""Scores of models, experts and mixtures on a suite: side by side, per skill, with intervals.

All subjects share one base model and one engine. An answer under greedy decoding depends on the item and its
weighted experts alone, so each such pair is generated once however many subjects ask for it: a routed mixture, an
oracle and a random router cost little once every expert has answered.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.experts.metrics import check_metric, choice_index, score
from xpert.progress import SILENT, Progress
from xpert.protocols import Engine, EngineRequest, Sampling, WeightedExperts
from xpert.records import SuiteItem
from xpert.registry.card import Interval

__all__ = [
    "Asked",
    "EvalOptions",
    "Evaluation",
    "Given",
    "ItemResult",
    "Subject",
    "bootstrap",
    "evaluate",
    "usable_items",
]

BOOTSTRAP_SAMPLES = 2000
_RESAMPLED_AT_ONCE = 2_000_000
"""Scores drawn at once: 32 MB."""


@dataclass(frozen=True)
class EvalOptions(Config):
    """How a suite is run."""

    max_tokens: int = option(64, "longest answer, in tokens", minimum=1)
    max_batch: int = option(16, "answers generated at once", minimum=1)
    skip_metric: tuple[str, ...] = option((), "leave out items scored by these metrics")
    limit: int | None = option(None, "at most this many items per skill, the first ones", minimum=1)


@dataclass(frozen=True)
class Asked:
    """Who answers an item: weighted experts, and the gate that weighs them at every token, if any."""

    experts: WeightedExperts = ()
    gate: str | None = None
    gate_bias: WeightedExperts = ()

    def request(self, id: str, prompt: tuple[int, ...], sampling: Sampling) -> EngineRequest:
        return EngineRequest(id, prompt, self.experts, sampling, gate=self.gate, gate_bias=self.gate_bias)


@dataclass(frozen=True)
class Given:
    """An answer that came of several requests: whose it is, and how many replies and tokens were generated for it."""

    output: str
    experts: WeightedExperts
    replies: int
    tokens: int


@dataclass(frozen=True)
class Subject:
    """Something that answers: `assign` gives the weighted experts of each item (none: the base model alone).

    `gate`: the engine's gate that weighs them token by token, with what `biases` says of each item's experts.
    `answers`: of a subject whose answers are more than one request each, the way they are made; it then answers by
    these alone, and its choices by likelihood are not known.
    """

    name: str
    assign: Callable[[Sequence[SuiteItem]], Sequence[WeightedExperts]]
    gate: str | None = None
    biases: Callable[[Sequence[SuiteItem]], Sequence[WeightedExperts]] | None = None
    answers: Callable[[Sequence[SuiteItem], Sampling], Sequence[Given]] | None = None

    def asks(self, items: Sequence[SuiteItem]) -> list[Asked]:
        """What the engine is asked for each item."""
        experts = self.assign(items)
        biases = self.biases(items) if self.biases is not None else [()] * len(items)
        return [
            Asked(chosen, self.gate, bias) if chosen else Asked() for chosen, bias in zip(experts, biases, strict=True)
        ]

    @classmethod
    def fixed(cls, name: str, experts: WeightedExperts) -> Subject:
        """The same experts for every item."""
        return cls(name, lambda items: [experts] * len(items))


@dataclass(frozen=True)
class ItemResult:
    """One subject's result on one item. `choice`: is the likeliest choice right? None where there are no choices.

    confidence: the geometric mean of the probabilities of the output's tokens, None where it was not asked for.
    `given`: the answer came of several requests, so that it is nobody else's.
    """

    id: str
    skill: str
    output: str
    score: float
    choice: bool | None
    experts: WeightedExperts
    asked: Asked | None = None
    confidence: float | None = None
    given: bool = False


@dataclass(frozen=True)
class Evaluation:
    """All subjects on all items; items in suite order.

    `spent`: what was computed anew took `seconds` of wall time, of them `answer_seconds` until the last of `tokens`
    generated tokens (the end of a turn counts as one); the rest went into weighing choices.
    """

    items: Sequence[SuiteItem]
    results: Mapping[str, Sequence[ItemResult]]
    seed: int = 0
    generated: int = 0
    spent: Mapping[str, float] = field(default_factory=dict)

    @property
    def skills(self) -> list[str]:
        return sorted({item.skill for item in self.items})

    def metric(self, skill: str) -> str:
        """The metric of a skill's items; several are joined by `+`."""
        return "+".join(sorted({item.metric for item in self.items if item.skill == skill}))

    def interval(self, subject: str, skill: str | None = None) -> Interval:
        """Mean score over a skill's items, or over all."""
        return bootstrap([r.score for r in self._of(subject, skill)], self.seed_of(skill))

    def metric_over(self, rows: Sequence[int]) -> str:
        """The metric of some items, by their places; several are joined by `+`."""
        return "+".join(sorted({self.items[row].metric for row in rows}))

    def interval_over(self, subject: str, rows: Sequence[int], name: str) -> Interval:
        """Mean score over some items, by their places. `name` seeds the resamples."""
        results = self.results[subject]
        return bootstrap([results[row].score for row in rows], self.seed_of(name))

    def choice_interval(self, subject: str, skill: str | None = None) -> Interval | None:
        """Accuracy by likelihood over choices; None where no item has choices."""
        right = [float(r.choice) for r in self._of(subject, skill) if r.choice is not None]
        return bootstrap(right, self.seed_of(skill)) if right else None

    def mean_over_skills(self, subject: str) -> float:
        """Each skill counts the same, however many items it has."""
        return float(np.mean([self.interval(subject, skill).score for skill in self.skills]))

    def to_dict(self) -> dict[str, Any]:
        """Scores per subject and skill, for JSON."""
        return {
            subject: {
                "overall": vars(self.interval(subject)),
                "mean_over_skills": self.mean_over_skills(subject),
                "skills": {
                    skill: {
                        "metric": self.metric(skill),
                        **vars(self.interval(subject, skill)),
                        "choice": vars(choice) if (choice := self.choice_interval(subject, skill)) else None,
                    }
                    for skill in self.skills
                },
            }
            for subject in self.results
        }

    def _of(self, subject: str, skill: str | None) -> list[ItemResult]:
        return [r for r in self.results[subject] if skill is None or r.skill == skill]

    def seed_of(self, skill: str | None) -> int:
        """The seed of a mean's resamples: the same for every subject, so that intervals differ by scores alone."""
        return self.seed + zlib.crc32((skill or "").encode())


def usable_items(items: Sequence[SuiteItem], options: EvalOptions) -> list[SuiteItem]:
    """The items that will be run, after --limit. Raises where a metric cannot run."""
    kept: list[SuiteItem] = []
    per_skill: dict[str, int] = {}
    for item in items:
        check_metric(item.metric)
        per_skill[item.skill] = per_skill.get(item.skill, 0) + 1
        if options.limit is None or per_skill[item.skill] <= options.limit:
            kept.append(item)
    return kept


def evaluate(
    engine: Engine,
    encode: Callable[[SuiteItem], tuple[int, ...]],
    encode_answer: Callable[[str], tuple[int, ...]],
    items: Sequence[SuiteItem],
    subjects: Sequence[Subject],
    options: EvalOptions | None = None,
    *,
    known: Evaluation | None = None,
    confidences: bool = False,
    weigh_choices: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Evaluation:
    """Answers every item by every subject, greedily, and scores the answers.

    `encode` gives an item's prompt as token ids, `encode_answer` an answer's with the end of turn. Cost: one
    generation and one likelihood per choice for each distinct (item, experts), less what `known` (an evaluation of
    the same items on the same engine) has answered. `confidences` has the engine tell its log-probabilities too;
    without `weigh_choices` no choice's likelihood is computed. Subjects with `answers` of their own cost what these
    cost.
    """
    options = options or EvalOptions()
    assigned = {subject.name: subject.asks(items) for subject in subjects if subject.answers is None}
    pairs = dict.fromkeys((i, asked) for rows in assigned.values() for i, asked in enumerate(rows))
    made = _made(items, known)
    wanted = [pair for pair in pairs if pair not in made]
    prompts = [encode(item) for item in items]
    begun = time.perf_counter()
    outputs, sure, tokens = _generate(engine, prompts, wanted, options, progress, confidences)
    given = _given(items, subjects, Sampling(max_tokens=options.max_tokens, seed=seed))
    tokens += sum(one.tokens for answers in given.values() for one in answers)
    answered = time.perf_counter()
    choices = _likeliest(engine, encode_answer, prompts, items, wanted, progress) if weigh_choices else {}
    spent = {"seconds": time.perf_counter() - begun, "answer_seconds": answered - begun, "tokens": tokens}
    for index, asked in wanted:
        made[index, asked] = ItemResult(
            id=items[index].row.id,
            skill=items[index].skill,
            output=outputs[index, asked],
            score=_score(items[index], outputs[index, asked]),
            choice=_is_right(items[index], choices.get((index, asked))),
            experts=asked.experts,
            asked=asked,
            confidence=sure.get((index, asked)),
        )
    results: dict[str, list[ItemResult]] = {}
    for subject in subjects:
        if subject.answers is None:
            results[subject.name] = [made[index, asked] for index, asked in enumerate(assigned[subject.name])]
        else:
            results[subject.name] = [
                ItemResult(i.row.id, i.skill, one.output, _score(i, one.output), None, one.experts, given=True)
                for i, one in zip(items, given[subject.name], strict=True)
            ]
    generated = len(wanted) + sum(one.replies for answers in given.values() for one in answers)
    return Evaluation(items, results, seed=seed, generated=generated, spent=spent)


def _score(item: SuiteItem, output: str) -> float:
    return score(item.metric, output, item.answers, item.choices)


def _given(items: Sequence[SuiteItem], subjects: Sequence[Subject], sampling: Sampling) -> dict[str, Sequence[Given]]:
    """The answers of subjects that have a way of their own to make them."""
    return {subject.name: subject.answers(items, sampling) for subject in subjects if subject.answers is not None}


_Pair = tuple[int, Asked]


def _made(items: Sequence[SuiteItem], known: Evaluation | None) -> dict[_Pair, ItemResult]:
    """The results that need not be computed again."""
    if known is None:
        return {}
    if [item.row.id for item in known.items] != [item.row.id for item in items]:
        raise ValueError("the known evaluation is of other items")
    return {
        (index, result.asked or Asked(result.experts)): result
        for rows in known.results.values()
        for index, result in enumerate(rows)
        if not result.given
    }


def _generate(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    wanted: Sequence[_Pair],
    options: EvalOptions,
    progress: Progress,
    confidences: bool,
) -> tuple[dict[_Pair, str], dict[_Pair, float], int]:
    """The outputs, their confidences where those are asked for (NaN without tokens), and the tokens generated."""
    sampling = Sampling(max_tokens=options.max_tokens, logprobs=0 if confidences else None)
    requests = [asked.request(str(n), prompts[index], sampling) for n, (index, asked) in enumerate(wanted)]
    texts: dict[_Pair, list[str]] = {pair: [] for pair in wanted}
    logprobs: dict[_Pair, list[float]] = {pair: [] for pair in wanted} if confidences else {}
    tokens = 0
    with progress.task("answering", len(requests)) as task:
        for piece in engine.generate(requests):
            pair = wanted[int(piece.request_id)]
            texts[pair].append(piece.text)
            if confidences:
                logprobs[pair] += [token.logprob for token in piece.tokens]
            if piece.finished:
                tokens += piece.completion_tokens
                task.advance()
    sure = {pair: math.exp(sum(told) / len(told)) if told else math.nan for pair, told in logprobs.items()}
    return {pair: "".join(parts) for pair, parts in texts.items()}, sure, tokens


def _likeliest(
    engine: Engine,
    encode_answer: Callable[[str], tuple[int, ...]],
    prompts: Sequence[tuple[int, ...]],
    items: Sequence[SuiteItem],
    wanted: Sequence[_Pair],
    progress: Progress,
) -> dict[_Pair, int]:
    """Index of the likeliest choice: the greatest summed log-probability of the choice and its end of turn."""
    asked = [(pair, choice) for pair in wanted for choice in items[pair[0]].choices or ()]
    if not asked:
        return {}
    requests = [pair[1].request(str(n), prompts[pair[0]], Sampling()) for n, (pair, _) in enumerate(asked)]
    answers = [encode_answer(choice) for _, choice in asked]
    sums: dict[_Pair, list[float]] = {}
    step = 256
    with progress.task("weighing choices", len(requests)) as task:
        for start in range(0, len(requests), step):
            part = slice(start, start + step)
            found = engine.continuation_logprobs(requests[part], answers[part])
            for (pair, _), logprobs in zip(asked[part], found, strict=True):
                sums.setdefault(pair, []).append(float(np.sum(logprobs)))
            task.advance(len(found))
    return {pair: int(np.argmax(values)) for pair, values in sums.items()}


def _is_right(item: SuiteItem, choice: int | None) -> bool | None:
    if choice is None or item.choices is None:
        return None
    return choice in {choice_index(answer, item.choices) for answer in item.answers}


def bootstrap(scores: Sequence[float], seed: int = 0) -> Interval:
    """Mean with its 95 % percentile bootstrap interval over items (Efron 1979), 2,000 resamples."""
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no scores")
    rng = np.random.default_rng(seed)
    step = max(1, _RESAMPLED_AT_ONCE // values.size)  # of 100,000 items, all resamples together took 3 GB
    sizes = [min(step, BOOTSTRAP_SAMPLES - start) for start in range(0, BOOTSTRAP_SAMPLES, step)]
    means = [values[rng.integers(0, values.size, size=(size, values.size))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(score=float(values.mean()), low=float(low), high=float(high), n=int(values.size))
