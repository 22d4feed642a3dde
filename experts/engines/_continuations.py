"""Scoring given continuations: what log-probability the model gives each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from xpert.errors import BadInput
from xpert.experts.engines._bank import AdapterBank, Handle
from xpert.experts.engines._kv_cache import gather
from xpert.experts.engines._lora_plan import RowMixture, row_order
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._requests import Asked
from xpert.protocols import EngineRequest

__all__ = ["continuation_logprobs", "prompt_batches"]

Ids = tuple[int, ...]
_Prompt = tuple[Asked, Ids, list[int]]
"""Experts and tokens of a distinct prompt, and which requests have it."""
_Row = tuple[RowMixture, Ids, list[int]]
"""The same with its adapters on the device."""


def continuation_logprobs(
    passes: Passes,
    bank: AdapterBank,
    requests: Sequence[EngineRequest],
    asked: Sequence[Asked],
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
    for prompts in prompt_batches(bank, requests, asked, max_batch):
        handles = _handles(prompts)
        lease = bank.wait(handles) if handles else None
        try:
            rows: list[_Row] = [
                (one.with_adapters(lease, handles) if lease else RowMixture(), ids, members)
                for one, ids, members in prompts
            ]
            rows.sort(key=lambda row: row_order(row[0]))
            _score(passes, rows, continuations, max_batch, scores)
        finally:
            if lease is not None:
                bank.release(lease)
    return scores


def prompt_batches(
    bank: AdapterBank, requests: Sequence[EngineRequest], asked: Sequence[Asked], size: int
) -> Iterator[list[_Prompt]]:
    """Distinct (experts, tokens, which requests have them), in batches of like length whose adapters fit together."""
    distinct: dict[tuple[Asked, Ids], list[int]] = {}
    for index, request in enumerate(requests):
        distinct.setdefault((asked[index], request.prompt_ids), []).append(index)
    prompts = [(one, ids, members) for (one, ids), members in distinct.items()]
    prompts.sort(key=lambda prompt: len(prompt[1]), reverse=True)
    if not _fit(bank, prompts):
        # Few changes of adapters matter more than little padding.
        prompts.sort(key=lambda prompt: [(handle.key, handle.fingerprint) for handle in prompt[0].handles])
    batch: list[_Prompt] = []
    for prompt in prompts:
        if len(batch) == size or (batch and not _fit(bank, [*batch, prompt])):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _handles(prompts: Sequence[_Prompt]) -> tuple[Handle, ...]:
    return tuple(dict.fromkeys(handle for one, _, _ in prompts for handle in one.handles))


def _fit(bank: AdapterBank, prompts: Sequence[_Prompt]) -> bool:
    try:
        bank.fits(_handles(prompts))
    except BadInput:
        return False
    return True


def _score(
    passes: Passes, prompts: Sequence[_Row], continuations: Sequence[Ids], max_batch: int, scores: list[list[float]]
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
