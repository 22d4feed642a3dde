"""How experts show on the shots: what they answer, and how likely they find the wanted text.

The wanted text is the answer; where a shot has a column `rationale`, it is the answer and then, on a new line, the
rationale ("reasoning perplexity": an expert that guesses an answer rarely expects its explanation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.metrics import score
from xpert.progress import SILENT, Progress, Task
from xpert.protocols import EngineRequest, Sampling, WeightedExperts
from xpert.records import Row, Shots

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["RATIONALE", "Showing", "score_shots", "target_of", "with_rationale"]

RATIONALE = "rationale"
"""The column of a shot that explains its answer."""

_AT_ONCE = 64
"""Requests whose continuations are scored in one call, at least: enough to fill the engine's batches."""


@dataclass(frozen=True)
class Showing:
    """accuracy: mean score in [0, 1] of greedy answers. perplexity: mean over shots of exp(mean NLL of the wanted
    tokens), above 0; infinite where it is beyond floating point."""

    accuracy: float
    perplexity: float


def score_shots(
    lm: LanguageModel,
    engine: Any,
    sets: Mapping[str, WeightedExperts],
    shots: Shots,
    *,
    progress: Progress = SILENT,
) -> dict[str, Showing]:
    """The showing of every named set of experts (() is the base model alone); the engine holds the experts.

    Answers are compared by each shot's own metric, exact match where it names none. All sets share the engine's
    batches, set after set, so that few different experts meet in one batch and none of its places stays empty.
    Cost: sets x K greedy answers, of at most 8 tokens more than the longest right one, and as many scored texts.
    """
    from xpert.language_model import encode_examples

    encoded = encode_examples(lm.tokenizer, list(shots))
    wanted = encode_examples(lm.tokenizer, [replace(row, response=target_of(row)) for row in shots])
    sampling = Sampling(max_tokens=max(len(ids) - start for ids, start in encoded) + 8)
    requests = [
        EngineRequest(
            f"shot {index + 1} for {f'expert {name}' if name else 'the base'}", tuple(ids[:start]), experts, sampling
        )
        for name, experts in sets.items()
        for index, (ids, start) in enumerate(encoded)
    ]
    targets = [tuple(ids[start:]) for ids, start in wanted] * len(sets)
    with progress.task("recruiting: answers", total=len(requests)) as task:
        outputs = _answers(engine, requests, task)
    with progress.task("recruiting: perplexities", total=len(requests)) as task:
        perplexities = _perplexities(engine, requests, targets, len(shots), task)
    rows = list(shots) * len(sets)
    right = [_score(row, output) for row, output in zip(rows, outputs, strict=True)]
    count = len(shots)
    return {
        name: Showing(_mean(right[at : at + count]), _mean(perplexities[at : at + count]))
        for name, at in zip(sets, range(0, len(requests), count), strict=True)
    }


def target_of(row: Row) -> str:
    """The text whose perplexity counts. Raises BadInput for a rationale that is not text."""
    rationale = row.columns.get(RATIONALE)
    if rationale is None or rationale == "":
        return row.response
    if not isinstance(rationale, str):
        raise BadInput(f"the rationale is {rationale!r}, not text", where=f"shot {row.id}")
    return f"{row.response}\n{rationale}"


def with_rationale(shots: Shots) -> int:
    """How many shots have a rationale."""
    return sum(target_of(row) != row.response for row in shots)


def _answers(engine: Any, requests: Sequence[EngineRequest], task: Task) -> list[str]:
    texts = {request.id: "" for request in requests}
    for piece in engine.generate(requests):
        texts[piece.request_id] += piece.text
        if piece.finished:
            task.advance(1)
    return list(texts.values())


def _perplexities(
    engine: Any, requests: Sequence[EngineRequest], targets: Sequence[tuple[int, ...]], shots: int, task: Task
) -> list[float]:
    # A call sorts its requests by length, which mixes its experts: hence whole sets, and only as many as fill batches.
    step = shots * max(1, -(-_AT_ONCE // shots))
    found: list[float] = []
    for start in range(0, len(requests), step):
        part = requests[start : start + step]
        lines = engine.continuation_logprobs(part, targets[start : start + step])
        found += [_exp(-sum(line) / len(line)) for line in lines]
        task.advance(len(part))
    return found


def _exp(nats: float) -> float:
    # What is beyond floating point, or no number at all, is no likelihood either: it ranks last.
    return math.exp(nats) if nats < 700 else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _score(row: Row, output: str) -> float:
    given = row.columns.get("answers")
    answers = [str(answer) for answer in given] if isinstance(given, list) and given else [row.response]
    metric = row.columns.get("metric")
    return score(metric if isinstance(metric, str) else "exact", output, answers)
