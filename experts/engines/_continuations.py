"""Scoring given continuations: what log-probability the model gives each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from xpert.errors import BadInput
from xpert.experts.engines._kv_cache import gather
from xpert.experts.engines._lora_plan import RowExperts, row_order
from xpert.experts.engines._passes import Passes
from xpert.protocols import EngineRequest

__all__ = ["continuation_logprobs"]

Ids = tuple[int, ...]
_Prompt = tuple[RowExperts, Ids, list[int]]
"""Experts and tokens of a distinct prompt, and which requests have it."""


def continuation_logprobs(
    passes: Passes,
    requests: Sequence[EngineRequest],
    experts: Sequence[RowExperts],
    continuations: Sequence[Ids],
    max_batch: int,
) -> list[list[float]]:
    """One list per request, of its continuation's length.

    Each distinct (prompt, experts) is computed once; then the continuations behind it, without their last token, whose
    logits nobody needs. Logits exist for the continuations alone: memory O(max_batch x longest continuation x
    vocabulary).
    """
    if len(requests) != len(continuations):
        raise ValueError(f"{len(requests)} requests, but {len(continuations)} continuations")
    for request, continuation in zip(requests, continuations, strict=True):
        where = f"request {request.id}"
        if not continuation:
            raise BadInput("the continuation is empty", where=where)
        passes.check_prompt(request.prompt_ids, where=where, room=len(continuation))
        passes.check_prompt(continuation, where=where, room=0)
    scores: list[list[float]] = [[] for _ in requests]
    for prompts in _batches(requests, experts, max_batch):
        _score(passes, prompts, continuations, max_batch, scores)
    return scores


def _batches(requests: Sequence[EngineRequest], experts: Sequence[RowExperts], size: int) -> Iterator[list[_Prompt]]:
    """Distinct prompts in batches of like length, each batch sorted by expert set."""
    distinct: dict[tuple[RowExperts, Ids], list[int]] = {}
    for index, request in enumerate(requests):
        distinct.setdefault((experts[index], request.prompt_ids), []).append(index)
    prompts = [(row, ids, members) for (row, ids), members in distinct.items()]
    prompts.sort(key=lambda prompt: len(prompt[1]), reverse=True)
    for start in range(0, len(prompts), size):
        yield sorted(prompts[start : start + size], key=lambda prompt: row_order(prompt[0]))


def _score(
    passes: Passes, prompts: list[_Prompt], continuations: Sequence[Ids], max_batch: int, scores: list[list[float]]
) -> None:
    rows = [row for row, _, _ in prompts]
    logits, cache = passes.prefill([ids for _, ids, _ in prompts], rows)
    first = logits.float().log_softmax(-1)
    pending: list[tuple[int, int]] = []  # (prompt's place in the batch, request)
    for place, (_, _, members) in enumerate(prompts):
        for index in members:
            scores[index].append(float(first[place, continuations[index][0]]))
            if len(continuations[index]) > 1:
                pending.append((place, index))
    for start in range(0, len(pending), max_batch):
        chunk = pending[start : start + max_batch]
        width = max(len(prompts[place][1]) for place, _ in chunk)
        branch = gather([(cache, place) for place, _ in chunk], width, passes.config)
        fed = [continuations[index][:-1] for _, index in chunk]
        longest = max(map(len, fed))
        # Padding stands at the right here: causal attention keeps it from the tokens before it.
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in fed], device=passes.device)
        pads = [width - len(prompts[place][1]) for place, _ in chunk]
        plan = passes.planner.make_plan([rows[place] for place, _ in chunk], longest)
        logprobs = passes.forward(ids, pads, plan, branch, keep=longest).float().log_softmax(-1)
        for row, (_, index) in enumerate(chunk):
            targets = torch.tensor(continuations[index][1:], device=passes.device)
            scores[index] += logprobs[row, torch.arange(len(targets)), targets].tolist()
