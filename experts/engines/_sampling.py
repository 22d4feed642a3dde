"""Choosing the next token of each row by its own rules and its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from xpert.errors import BadInput
from xpert.protocols import Sampling, TokenLogprob

__all__ = ["Chooser", "check_sampling", "choose", "token_logprobs"]

CANDIDATES = 1024
"""Likeliest tokens that are sorted at first; a row whose rules keep more sorts the whole vocabulary."""


class Chooser:
    """One request's sampling rules and its stream of random numbers, which nothing else in the batch draws from."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self.rules = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._prompt = prompt
        self._seen: torch.Tensor | None = None

    @property
    def greedy(self) -> bool:
        return self.rules.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out before the draw."""
        return bool(self.rules.top_k) or self.rules.top_p < 1 or self.rules.min_p > 0

    def draw(self) -> float:
        """A number in [0, 1); one per token."""
        return float(self._random.random())

    def seen(self, logits: torch.Tensor) -> torch.Tensor:
        """bool [vocabulary]: the tokens of the prompt and the reply so far."""
        if self._seen is None:
            self._seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            self._seen[torch.tensor(self._prompt, dtype=torch.long, device=logits.device)] = True
        return self._seen

    def note(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True


def check_sampling(sampling: Sampling, *, where: str) -> None:
    """Raises BadInput for values that make no sense, naming them."""
    if sampling.max_tokens < 1:
        raise BadInput(f"max-tokens is {sampling.max_tokens}; the least is 1", where=where)
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise BadInput(f"temperature is {sampling.temperature}; the least is 0", where=where)
    if not 0 < sampling.top_p <= 1:
        raise BadInput(f"top-p is {sampling.top_p}; it must be above 0 and at most 1", where=where)
    if sampling.top_k < 0:
        raise BadInput(f"top-k is {sampling.top_k}; the least is 0, which keeps all tokens", where=where)
    if not 0 <= sampling.min_p <= 1:
        raise BadInput(f"min-p is {sampling.min_p}; it must lie between 0 and 1", where=where)
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise BadInput(f"repetition-penalty is {sampling.repetition_penalty}; it must be above 0", where=where)
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise BadInput(f"logprobs is {sampling.logprobs}; the least is 0", where=where)
    if "" in sampling.stop:
        raise BadInput("a stop string is empty", where=where)
    if sampling.seed is not None and sampling.seed < 0:
        raise BadInput(f"seed is {sampling.seed}; the least is 0", where=where)


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row; -1 for a row whose logits are not numbers.

    logits [rows, vocabulary], any float dtype; -inf rules a token out. Each row is decided by its own logits and its
    own chooser alone. Time O(rows x vocabulary), and a sort of the vocabulary for rows that keep very many tokens.
    """
    logits = _penalised(logits, choosers)
    best, tokens = logits.max(dim=-1)  # NaN wins a maximum, so one check finds it
    chosen: list[int] = torch.where(best.isfinite(), tokens, -1).tolist()
    rows = [row for row, chooser in enumerate(choosers) if not chooser.greedy and chosen[row] >= 0]
    for filters, draw in ((False, _draw_from_all), (True, _draw_filtered)):
        group = [row for row in rows if choosers[row].filters == filters]
        if group:
            sampled = draw(_scaled(logits[group], [choosers[row] for row in group]), [choosers[row] for row in group])
            for row, token in zip(group, sampled, strict=True):
                chosen[row] = token
    for chooser, token in zip(choosers, chosen, strict=True):
        if token >= 0:
            chooser.note(token)
    return chosen


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[TokenLogprob]:
    """What the model itself thought of each row's token, and the likeliest `alternatives[row]` tokens.

    logits [rows, vocabulary] as the model gave them. Cost O(rows x vocabulary).
    """
    logprobs = logits.float().log_softmax(-1)
    picked = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(alternatives), logits.shape[-1])
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], logprobs[:, :0].long())
    ranked = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(best[:count], given[:count], strict=True)))
        for token, logprob, count, (best, given) in zip(tokens, picked, alternatives, ranked, strict=True)
    ]


def _penalised(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """Logits with each row's repetition penalty; a copy where there is any."""
    rows = [row for row, chooser in enumerate(choosers) if chooser.rules.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.clone() if logits.dtype == torch.float32 else logits.float()  # bfloat16 would round penalties away
    seen = torch.stack([choosers[row].seen(logits) for row in rows])
    penalty = _column([choosers[row].rules.repetition_penalty for row in rows], logits).to(logits.dtype)
    before = logits[rows]
    logits[rows] = torch.where(seen, torch.where(before > 0, before / penalty, before * penalty), before)
    return logits


def _scaled(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / _column([c.rules.temperature for c in choosers], logits)


def _draw_from_all(scaled: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse-CDF sampling over the whole vocabulary, in its own order."""
    return _drawn(scaled.softmax(-1), [chooser.draw() for chooser in choosers])


def _draw_filtered(scaled: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Inverse-CDF sampling from the likeliest tokens that the rows' rules keep."""
    vocabulary = scaled.shape[-1]
    largest = max(chooser.rules.top_k for chooser in choosers)
    size = min(vocabulary, max(CANDIDATES, 2 * largest))
    draws = [chooser.draw() for chooser in choosers]
    kept, tokens = _kept(scaled, size, choosers)
    places = torch.tensor(_drawn(kept, draws), device=tokens.device)
    picked: list[int] = tokens.gather(-1, places[:, None])[:, 0].tolist()
    if size < vocabulary:
        # A row that keeps its last candidate, or one as likely, might keep some that were not looked at.
        last = scaled.gather(-1, tokens[:, -1:])
        edge = ((scaled.gather(-1, tokens) == last) & (kept > 0)).any(-1)
        full = [row for row, at_edge in enumerate(edge.tolist()) if at_edge]
        if full:
            kept, tokens = _kept(scaled[full], vocabulary, [choosers[row] for row in full])
            for row, place, ids in zip(full, _drawn(kept, [draws[row] for row in full]), tokens, strict=True):
                picked[row] = int(ids[place])
    return picked


def _kept(scaled: torch.Tensor, size: int, choosers: Sequence[Chooser]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probability, 0 for what is left out; token) of the `size` likeliest tokens, likeliest first.

    Equal tokens stand in the order of their ids, so that `size` does not decide what is kept.
    """
    if size == scaled.shape[-1]:
        top, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    else:
        top, tokens = scaled.topk(size, dim=-1, sorted=False)
        tokens, order = tokens.sort(dim=-1)
        top, order = top.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(-1, order)
    limit = _column([chooser.rules.top_k or scaled.shape[-1] for chooser in choosers], scaled)
    among = torch.arange(size, device=scaled.device)[None] < limit
    # Shares of what top-k keeps, which is everything where it is off.
    whole = scaled.logsumexp(-1, keepdim=True)
    whole = torch.where(limit < scaled.shape[-1], top.masked_fill(~among, -math.inf).logsumexp(-1, keepdim=True), whole)
    probability = (top - whole).exp() * among
    before = probability.cumsum(-1) - probability
    # The sum of all may round to 1 before the last token, which top-p 1 keeps too.
    reach = [chooser.rules.top_p if chooser.rules.top_p < 1 else math.inf for chooser in choosers]
    probability = probability * (before < _column(reach, scaled))
    floor = _column([chooser.rules.min_p for chooser in choosers], scaled) * probability[:, :1]
    return probability * (probability >= floor), tokens


def _drawn(probability: torch.Tensor, draws: Sequence[float]) -> list[int]:
    """Places [rows] drawn in proportion to `probability` [rows, places], of which some is above 0."""
    total = probability.cumsum(-1)
    target = _column(draws, probability) * total[:, -1:]
    place = torch.searchsorted(total, target, right=True).clamp(max=probability.shape[-1] - 1)
    # Rounding could put the place behind the last token that is kept.
    last = probability.shape[-1] - 1 - (probability > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    found: list[int] = torch.minimum(place, last)[:, 0].tolist()
    return found


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
