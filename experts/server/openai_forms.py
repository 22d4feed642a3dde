"""Replies, pieces, log-probabilities and usage in OpenAI's forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from xpert.experts.mixture import BASE
from xpert.experts.routing import explain
from xpert.experts.server.replies import Task
from xpert.experts.server.token_texts import TokenTexts
from xpert.protocols import TokenLogprob, WeightedExperts

__all__ = [
    "DONE",
    "chat_logprobs",
    "completion_logprobs",
    "event",
    "experts_header",
    "explanation",
    "text_length",
    "usage",
]

DONE = "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(prompt: int, completions: Sequence[int]) -> dict[str, int]:
    """Tokens of the prompts, as `Call.prompt_tokens`, and of all replies."""
    completion = sum(completions)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def experts_header(experts: WeightedExperts) -> str:
    """`a=0.7,b=0.3`, or `base`; characters that a header cannot hold are percent-encoded."""
    return ",".join(f"{quote(key, safe='/@._-')}={weight:.4g}" for key, weight in experts) or BASE


def explanation(task: Task) -> dict[str, Any]:
    """The route of a task and how it was answered, as the answer's `xpert` says it on request."""
    outcome = task.outcome
    return {
        **explain(task.id, task.route),
        "answered_by": [{"expert": key, "weight": round(weight, 6)} for key, weight in outcome.experts],
        "reason": outcome.reason,
        "stage": outcome.stage,
        **({"confidence": round(outcome.confidence, 4)} if outcome.confidence is not None else {}),
        **({"aggregated": outcome.log} if outcome.log is not None else {}),
        "generation": task.generation.number,
    }


def chat_logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts, ends: frozenset[int]) -> dict[str, Any]:
    """As in `choices[].logprobs` of a chat completion: without the token of `ends` that ended the reply."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = texts.of(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    return {
        "content": [
            {**entry(told.token, told.logprob), "top_logprobs": [entry(*other) for other in told.alternatives]}
            for told in tokens
            if told.token not in ends
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[TokenLogprob], texts: TokenTexts, *, first: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """As in `choices[].logprobs` of a completion.

    The token that ended the reply is told too, as vLLM does: lm-eval counts on one token per `max_tokens=1`.
    `first`: the token that stands before all, of which no probability is known, as at the start of an echoed prompt.
    `offset`: where in the choice's text the tokens begin.
    """
    names: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    if first is not None:
        names, logprobs, tops, offsets = [texts.of(first)[0]], [None], [None], [offset]
        offset += text_length([first], texts)
    for told in tokens:
        name = texts.of(told.token)[0]
        names.append(name)
        logprobs.append(_finite(told.logprob))
        # The chosen token is always among them; of several tokens with one text the likeliest is told.
        top: dict[str, float] = {}
        for other, logprob in [*told.alternatives, (told.token, told.logprob)]:
            top.setdefault(texts.of(other)[0], _finite(logprob))
        tops.append(top)
        offsets.append(offset)
        offset += text_length([told.token], texts)
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def text_length(tokens: Iterable[int], texts: TokenTexts) -> int:
    """Characters that begin in these tokens; those of one character's bytes have one together."""
    return sum(byte & 0xC0 != 0x80 for token in tokens for byte in texts.of(token)[1])


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)
