"""Choosing experts by the K shots of a task: who answers them right, and to whom their answers are likely.

First form of expert selection in "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models"
(arXiv:2408.15915): rank by accuracy plus rank by perplexity, without its group diversity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.metrics import score
from xpert.progress import SILENT, Progress
from xpert.protocols import EngineRequest, Sampling, WeightedExperts
from xpert.records import Row, Shots
from xpert.registry.ranking import average_ranks

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["Recruit", "recruit", "score_shots"]


@dataclass(frozen=True)
class Recruit:
    """One expert's showing on the shots. `rank` is the sum of its two ranks, lower is better."""

    key: str
    accuracy: float
    perplexity: float
    rank: float
    chosen: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "expert": self.key,
            "accuracy": round(self.accuracy, 4),
            "perplexity": round(self.perplexity, 4),
            "rank": self.rank,
            "chosen": self.chosen,
            "reason": self.reason,
        }


def recruit(
    lm: LanguageModel,
    engine: Any,
    keys: Sequence[str],
    shots: Shots,
    *,
    max_experts: int = 8,
    progress: Progress = SILENT,
) -> list[Recruit]:
    """Every expert, best first, with whether it is in and why.

    An expert is out if it beats the base model in neither accuracy nor perplexity, or if `max_experts` others rank
    before it. Raises BadInput where all are out. Cost: (experts + 1) · K greedy answers and as many scored ones.
    """
    shown: dict[str, tuple[float, float]] = {}
    with progress.task("recruiting", total=len(keys) + 1) as task:
        for key in ("", *keys):
            shown[key] = score_shots(lm, engine, ((key, 1.0),) if key else (), shots)
            task.advance(1, key or "base")
    base_accuracy, base_perplexity = shown.pop("")
    by_accuracy = average_ranks({key: shown[key][0] for key in keys})
    by_perplexity = average_ranks({key: -shown[key][1] for key in keys})
    ranks = {key: by_accuracy[key] + by_perplexity[key] for key in keys}
    found: list[Recruit] = []
    for key in sorted(keys, key=lambda key: (ranks[key], shown[key][1], key)):
        accuracy, perplexity = shown[key]
        better = [
            text
            for text, is_better in (
                (f"accuracy {accuracy:.2f} against the base's {base_accuracy:.2f}", accuracy > base_accuracy),
                (f"perplexity {perplexity:.2f} against {base_perplexity:.2f}", perplexity < base_perplexity),
            )
            if is_better
        ]
        taken = sum(one.chosen for one in found)
        if not better:
            chosen, reason = (
                False,
                (
                    f"no better than the base: accuracy {accuracy:.2f} against {base_accuracy:.2f}, "
                    f"perplexity {perplexity:.2f} against {base_perplexity:.2f}"
                ),
            )
        elif taken >= max_experts:
            chosen, reason = False, f"{max_experts} experts rank before it ({', '.join(better)})"
        else:
            chosen, reason = True, f"rank {taken + 1}: {', '.join(better)}"
        found.append(Recruit(key, accuracy, perplexity, ranks[key], chosen, reason))
    if not any(one.chosen for one in found):
        raise BadInput(
            "no expert is better than the base model on these shots",
            hint="name experts with --experts and leave out --shots, or train an expert on these shots",
        )
    return found


def score_shots(lm: LanguageModel, engine: Any, experts: WeightedExperts, shots: Shots) -> tuple[float, float]:
    """(accuracy, perplexity) on the shots: the mean score of greedy answers by each shot's own metric (exact match
    where it names none), and the mean of exp(mean NLL of its answer's tokens)."""
    from xpert.language_model import encode_example

    encoded = [encode_example(lm.tokenizer, row) for row in shots]
    answers = [tuple(ids[start:]) for ids, start in encoded]
    longest = max(len(answer) for answer in answers)
    requests = [
        EngineRequest(str(index), tuple(ids[:start]), experts, Sampling(max_tokens=longest + 8))
        for index, (ids, start) in enumerate(encoded)
    ]
    outputs = ["" for _ in requests]
    for piece in engine.generate(requests):
        outputs[int(piece.request_id)] += piece.text
    right = [_score(row, output) for row, output in zip(shots, outputs, strict=True)]
    logprobs = engine.continuation_logprobs(requests, answers)
    perplexities = [math.exp(-sum(line) / len(line)) for line in logprobs]
    return sum(right) / len(right), sum(perplexities) / len(perplexities)


def _score(row: Row, output: str) -> float:
    given = row.columns.get("answers")
    answers = [str(answer) for answer in given] if isinstance(given, list) and given else [row.response]
    metric = row.columns.get("metric")
    return score(metric if isinstance(metric, str) else "exact", output, answers)
