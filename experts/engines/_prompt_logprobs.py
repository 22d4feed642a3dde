"""What log-probability the model gives each token of given prompts, in slices whose logits fit a bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xpert.experts.engines._bank import AdapterBank
from xpert.experts.engines._continuations import prompt_batches
from xpert.experts.engines._kv_cache import RowCache
from xpert.experts.engines._lora_plan import RowMixture, row_order
from xpert.experts.engines._passes import Passes
from xpert.experts.engines._requests import Asked
from xpert.protocols import EngineRequest, TokenLogprob

__all__ = ["LOGIT_BYTES", "prompt_logprobs"]

LOGIT_BYTES = 128 << 20
"""Bytes that the float32 logits of one pass may take."""


def prompt_logprobs(
    passes: Passes,
    bank: AdapterBank,
    requests: Sequence[EngineRequest],
    asked: Sequence[Asked],
    alternatives: int,
    max_batch: int,
) -> list[list[TokenLogprob]]:
    """One list per request: its prompt's tokens but the first, each with the `alternatives` likeliest.

    Each distinct (prompt, experts) is computed once, like lengths together, in passes of as many tokens as
    `LOGIT_BYTES` allows; keys and values stay between them. Other passes may come in between.
    """
    for request in requests:
        passes.check_prompt(request.prompt_ids, where=f"request {request.id}", room=0)
    found: list[list[TokenLogprob]] = [[] for _ in requests]
    for prompts in prompt_batches(bank, requests, asked, max_batch):
        handles = tuple(dict.fromkeys(handle for one, _, _ in prompts for handle in one.handles))
        lease = bank.wait(handles) if handles else None
        try:
            rows = [
                (one.with_adapters(lease, handles) if lease else RowMixture(), ids, members)
                for one, ids, members in prompts
            ]
            rows.sort(key=lambda row: row_order(row[0]))
            told = _told(passes, [row for row, _, _ in rows], [ids for _, ids, _ in rows], alternatives)
        finally:
            if lease is not None:
                bank.release(lease)
        for (_, _, members), logprobs in zip(rows, told, strict=True):
            for index in members:
                found[index] = list(logprobs)
    return found


def _told(
    passes: Passes, rows: Sequence[RowMixture], prompts: Sequence[Sequence[int]], alternatives: int
) -> list[list[TokenLogprob]]:
    longest = max(map(len, prompts))
    found: list[list[TokenLogprob]] = [[] for _ in prompts]
    # Padding stands at the right: causal attention keeps it from the tokens before it.
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=passes.device)
    cache = RowCache(passes.config)
    width = max(1, LOGIT_BYTES // (4 * len(prompts) * passes.vocabulary))
    for start in range(0, longest - 1, width):  # nobody needs the logits after the last token
        stop = min(start + width, longest - 1)
        plan = passes.planner.make_plan(rows, stop - start)
        logits = passes.forward(ids[:, start:stop], [0] * len(prompts), plan, cache, keep=stop - start).float()
        whole = logits.logsumexp(-1, keepdim=True)
        picked = (logits.gather(-1, ids[:, start + 1 : stop + 1, None]) - whole)[..., 0].tolist()
        best, likeliest = logits.topk(min(alternatives, logits.shape[-1]), dim=-1)
        values, tokens = (best - whole).tolist(), likeliest.tolist()
        for row, prompt in enumerate(prompts):
            for place in range(min(stop, len(prompt) - 1) - start):
                others = tuple(zip(tokens[row][place], values[row][place], strict=True))
                found[row].append(TokenLogprob(prompt[start + place + 1], picked[row][place], others))
    return found
