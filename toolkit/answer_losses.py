"""How a base model takes a row's answer: its loss with and without the prompt, its entropy, its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.protocols import RowWorker
from xpert.records import Row

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["UNPROMPTED", "AnswerLosses", "UnpromptedLosses", "refuse_nan"]

UNPROMPTED = "### Response:"
"""What stands before an answer that is read without its prompt (Cherry LLM's form)."""
_BATCH_TOKENS = 4096
_LOGIT_CELLS = 16_000_000


@dataclass(frozen=True)
class AnswerLosses:
    """A pass: the base model reads prompt and answer as it would in training.

    Arrays per row, means over its answer tokens: `nll` (negative log-likelihood), `entropy` (of the predicted
    distribution, nats), `el2n` (length of predicted distribution minus the true token's, Paul et al. 2021,
    arXiv:2107.07075); `tokens`, how many answer tokens were read, and `cut`, whether the row was longer than
    `max_length`. Where a prompt leaves no room for its answer, `tokens` is 0 and the means are NaN. Raises BadInput
    naming a row whose loss is no number. Cost: one forward pass a row.
    """

    base: str
    max_length: int = 1024
    dtype: str = "auto"
    name: ClassVar[str] = "answer-losses"
    shard_rows: ClassVar[int] = 256

    @property
    def key(self) -> Mapping[str, Any]:
        from xpert.language_model import model_fingerprint

        return {"base": model_fingerprint(self.base), "max_length": self.max_length, "dtype": self.dtype}

    def open(self, device: str) -> RowWorker:
        from xpert.language_model import encode_examples, load_model

        lm = load_model(self.base, device=device, dtype=self.dtype)
        limit = context_limit(lm, self.max_length)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            examples = encode_examples(lm.tokenizer, rows)
            cut = np.array([len(ids) > limit for ids, _ in examples])
            measured = _measure(lm, [(ids[:limit], start) for ids, start in examples], rows)
            return {**measured, "cut": cut}

        return work


@dataclass(frozen=True)
class UnpromptedLosses:
    """A pass: the loss of each answer as if nothing had been asked, `prefix` standing where its prompt was.

    `nll` and `tokens` per row, as of AnswerLosses; the answer is cut to the number of tokens that AnswerLosses reads
    of it, so that the two are of the same tokens.
    """

    base: str
    max_length: int = 1024
    prefix: str = UNPROMPTED
    dtype: str = "auto"
    name: ClassVar[str] = "unprompted-losses"
    shard_rows: ClassVar[int] = 256

    @property
    def key(self) -> Mapping[str, Any]:
        return {**AnswerLosses(self.base, self.max_length, self.dtype).key, "prefix": self.prefix}

    def open(self, device: str) -> RowWorker:
        from xpert.language_model import encode_examples, load_model

        lm = load_model(self.base, device=device, dtype=self.dtype)
        limit = context_limit(lm, self.max_length)
        ids = lm.tokenizer(self.prefix, add_special_tokens=True)["input_ids"] if self.prefix else []
        begin = tuple(ids) or (lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id,)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            alone = []
            for whole, start in encode_examples(lm.tokenizer, rows):
                answer = whole[start:limit]
                alone.append(((*begin, *answer)[:limit], len(begin)))
            measured = _measure(lm, alone, rows)
            return {"nll": measured["nll"], "tokens": measured["tokens"]}

        return work


def context_limit(lm: LanguageModel, max_length: int) -> int:
    """`max_length`, or what the model can read where that is less."""
    longest = getattr(lm.model.config, "max_position_embeddings", None)
    return min(max_length, longest) if isinstance(longest, int) and longest > 0 else max_length


def refuse_nan(values: NDArray[np.floating[Any]], scored: NDArray[np.bool_], rows: Sequence[Row], what: str) -> None:
    """Raises BadInput naming the first rows that were `scored` and whose value is no number."""
    bad = np.flatnonzero(scored & ~np.isfinite(values))
    if len(bad):
        named = ", ".join(rows[index].id for index in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise BadInput(
            f"{what} is not a number (rows {named})",
            hint="leave those rows out, or use a sound base model in float32",
        )


def _measure(
    lm: LanguageModel, examples: Sequence[tuple[tuple[int, ...], int]], rows: Sequence[Row]
) -> dict[str, NDArray[Any]]:
    """nll, entropy, el2n float32 [m] and tokens int32 [m] of encoded rows."""
    import torch

    from xpert.linear_capture import answer_logits, length_batches, make_batch

    found = {name: np.full(len(rows), np.nan, np.float32) for name in ("nll", "entropy", "el2n")}
    tokens = np.zeros(len(rows), np.int32)
    readable = np.array([index for index, (ids, start) in enumerate(examples) if max(start, 1) < len(ids)], np.int64)
    lengths = [len(examples[index][0]) for index in readable]
    with torch.inference_mode():
        for part in length_batches(lengths, _BATCH_TOKENS):
            indices = readable[part]
            batch = make_batch([examples[index] for index in indices], lm.device)
            logits, targets, row = answer_logits(lm.model, batch)
            count = batch.answer_tokens
            for name, values in _token_measures(logits, targets).items():
                sums = torch.zeros(len(indices), dtype=torch.float32, device=lm.device).index_add(0, row, values)
                found[name][indices] = (sums / count).cpu().numpy()
            tokens[indices] = count.cpu().numpy()
    refuse_nan(found["nll"], tokens > 0, rows, "the loss")
    return {**found, "tokens": tokens}


def _token_measures(logits: Any, targets: Any) -> dict[str, Any]:
    """nll, entropy and el2n float32 [m] of logits [m, v]; memory in slices of some rows."""
    import torch

    step = max(1, _LOGIT_CELLS // logits.shape[1])
    parts: dict[str, list[Any]] = {"nll": [], "entropy": [], "el2n": []}
    for start in range(0, len(logits), step):
        log_p = torch.log_softmax(logits[start : start + step].float(), dim=-1)
        p = log_p.exp()
        true = log_p.gather(1, targets[start : start + step, None])[:, 0]
        parts["nll"].append(-true)
        parts["entropy"].append(-(p * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(1))
        parts["el2n"].append((p.square().sum(1) - 2 * true.exp() + 1).clamp(min=0).sqrt())
    return {name: torch.cat(values) for name, values in parts.items()}
