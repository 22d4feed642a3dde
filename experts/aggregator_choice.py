"""Which model aggregates best: each candidate reads one right and two wrong replies, and writes the answer.

The synthetic test of Symbolic-MoE (https://arxiv.org/abs/2503.05641), which chooses an aggregator per benchmark. Where
a question has fewer than two wrong replies, the release fills up with empty strings, which every reader sees through;
here the place is taken by wrong answers that were given to other questions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from xpert.config import Config
from xpert.errors import BadInput
from xpert.experts.aggregated import with_aggregator
from xpert.experts.aggregating import Encoding, aggregate, answers_of, by_expert, engine_requests, model_encoding
from xpert.experts.aggregators._prompting import without_thinking
from xpert.experts.aggregators._voting import alone
from xpert.experts.aggregators.expert import write_final
from xpert.experts.evaluate import EvalOptions, bootstrap, usable_items
from xpert.experts.metrics import normalise, score
from xpert.experts.mixture import BASE, AggregatorChoice, Mixture
from xpert.progress import SILENT, Progress
from xpert.protocols import (
    Answer,
    Ask,
    Engine,
    Question,
    RoutableExpert,
    Route,
    Sampling,
    Verdict,
    Weigh,
    Weighed,
)
from xpert.records import SuiteItem
from xpert.registry.card import Interval

__all__ = ["ChosenAggregator", "Trial", "choose_aggregator", "score_candidates", "trials_of"]

WRONG = 2
_RIGHT_FROM = 0.5
"""The score from which a reply counts as right, where a metric gives credit in part."""


@dataclass(frozen=True)
class Trial:
    """An item with one right reply and some wrong ones, shuffled; `right` is the place of the right one."""

    item: int
    replies: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class ChosenAggregator:
    """The mixture with its aggregator, each candidate's mean score, best first, and what they were measured on.

    skipped: items to which nobody, or everybody, gave a right reply that could be used.
    """

    mixture: Mixture
    scores: Mapping[str, Interval]
    trials: int
    skipped: int

    @property
    def best(self) -> str:
        return next(iter(self.scores))

    def to_dict(self) -> dict[str, Any]:
        scores = {key: vars(interval) for key, interval in self.scores.items()}
        return {"aggregator": self.best, "scores": scores, "trials": self.trials, "skipped": self.skipped}


def choose_aggregator(
    mixture: Mixture,
    items: Sequence[SuiteItem],
    options: EvalOptions | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> ChosenAggregator:
    """The mixture with aggregator `expert`, read by whichever of its experts and the base aggregates best.

    Of equal ones the base is chosen, else the first by key. Cost: one reply per item and candidate to have replies, and
    as many to aggregate. Raises BadInput where no item has a right and a wrong reply, and where the mixture's gate or
    router does not go with an aggregator.
    """
    from xpert.experts.serving import load_engine

    options = options or EvalOptions()
    with_aggregator(mixture, AggregatorChoice("expert"))
    kept = usable_items(items, options)
    candidates = [BASE, *sorted(mixture.keys)]
    lm, engine = load_engine(mixture, device=device, max_batch=options.max_batch, progress=progress)
    try:
        encoding = model_encoding(lm.tokenizer, engine.context)
        sampling = Sampling(max_tokens=options.max_tokens)
        progress.say(f"{len(candidates)} candidates answer {len(kept):,} items")
        replies = _replies(engine, encoding, kept, candidates, sampling)
        trials = trials_of(kept, replies, seed=seed)
        if not trials:
            raise BadInput(
                "no item of the suite has both a right and a wrong reply of the mixture's experts",
                hint="take another suite, or more items",
            )
        scores = score_candidates(engine, encoding, kept, trials, candidates, sampling, progress=progress)
    finally:
        engine.close()
    intervals = {key: bootstrap(values, seed) for key, values in scores.items()}
    ordered = sorted(candidates, key=lambda key: (-intervals[key].score, candidates.index(key)))
    chosen = replace(
        with_aggregator(mixture, AggregatorChoice("expert", {"expert": ordered[0]})),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    return ChosenAggregator(chosen, {key: intervals[key] for key in ordered}, len(trials), len(kept) - len(trials))


def trials_of(items: Sequence[SuiteItem], replies: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[Trial]:
    """A trial for each item with a right reply; `replies` are those of each candidate, in the order of the items.

    Wrong replies are those given to the item, then those to other items of its skill, then to any. All are different,
    and none is empty. Items are left out where there is no right reply, or no wrong one at all.
    """
    texts = {key: [without_thinking(text) for text in given] for key, given in replies.items()}
    trials = []
    for place, item in enumerate(items):
        own = [given[place] for _, given in sorted(texts.items(), key=lambda pair: _drawn(seed, item, pair[0]))]
        right = next((text for text in own if text and _is_right(item, text)), None)
        if right is None:
            continue
        wrong: dict[str, str] = {}
        for text in _wrong(items, place, own, texts, seed):
            if len(wrong) == WRONG:
                break
            if normalise(text) and normalise(text) != normalise(right) and not _is_right(item, text):
                wrong.setdefault(normalise(text), text)
        if not wrong:
            continue
        shown = sorted([right, *wrong.values()], key=lambda text: _drawn(seed, item, text))
        trials.append(Trial(place, tuple(shown), shown.index(right)))
    return trials


def _wrong(
    items: Sequence[SuiteItem], place: int, own: Sequence[str], texts: Mapping[str, Sequence[str]], seed: int
) -> Iterator[str]:
    """Replies among which the wrong ones are found, the likeliest to deceive first."""
    yield from own
    item = items[place]
    others = [other for other in range(len(items)) if other != place]
    others.sort(key=lambda other: (items[other].skill != item.skill, _drawn(seed, item, items[other].row.id)))
    for other in others:
        for key in sorted(texts):
            yield texts[key][other]


def score_candidates(
    engine: Engine,
    encoding: Encoding,
    items: Sequence[SuiteItem],
    trials: Sequence[Trial],
    candidates: Sequence[str],
    sampling: Sampling,
    *,
    progress: Progress = SILENT,
) -> dict[str, list[float]]:
    """Candidate -> the score of the answer it writes in each trial."""
    asked = [(key, trial) for key in candidates for trial in trials]
    reading = {str(n): (key, trial.replies) for n, (key, trial) in enumerate(asked)}
    questions = [
        Question(str(n), items[trial.item].row.messages, Route((), (), "a trial"), sampling)
        for n, (_, trial) in enumerate(asked)
    ]
    found = aggregate(
        engine,
        encoding,
        _Reading(reading),
        questions,
        at_once=len(questions),
        where=lambda question: f"item {items[asked[int(question.id)][1].item].row.id}",
        progress=progress,
    )
    scores: dict[str, list[float]] = {key: [] for key in candidates}
    for (key, trial), dialogue in zip(asked, found, strict=True):
        assert dialogue.verdict is not None
        item = items[trial.item]
        scores[key].append(score(item.metric, dialogue.verdict.text, item.answers, item.choices))
    return scores


class _Reading:
    """Aggregates replies that are given: question id -> (who reads them, the replies)."""

    Options: ClassVar[type[Config]] = Config
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "one reply"
    source: ClassVar[str] = "https://arxiv.org/abs/2503.05641"

    def __init__(self, options: Mapping[str, tuple[str, tuple[str, ...]]], *, seed: int = 0, device: str = "auto"):
        self.reading = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        expert, replies = self.reading[question.id]
        final, _ = yield from write_final(question, replies, expert)
        return Verdict(final.text, (), f"{expert} wrote it", final.finished)


def _replies(
    engine: Engine,
    encoding: Encoding,
    items: Sequence[SuiteItem],
    candidates: Sequence[str],
    sampling: Sampling,
) -> dict[str, list[str]]:
    """Every candidate's own reply to every item, in one batch."""
    requests = [
        request
        for key in candidates
        for place, item in enumerate(items)
        for request in engine_requests(
            Ask(item.row.messages, alone(key), sampling), f"{place} {key}", encoding
        ).generations
    ]
    answers = answers_of(engine.generate(by_expert(requests)))
    return {key: [answers[f"{place} {key}"].text for place in range(len(items))] for key in candidates}


def _is_right(item: SuiteItem, text: str) -> bool:
    return score(item.metric, text, item.answers, item.choices) >= _RIGHT_FROM


def _drawn(seed: int, item: SuiteItem, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{item.row.id}\0{name}".encode("utf-8", "surrogatepass")).digest()
