"""How well the base model answers rows with known answers when given exemplars stand in its prompt.

The prompts of one list begin with the same ids. That beginning is read once, and every row goes on from its keys and
values; the scores are those of reading each prompt whole, but for rounding. Imports torch; itself imported only once
a model is needed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from xpert.answer_losses import context_limit
from xpert.chat_form import encode_examples
from xpert.errors import BadInput
from xpert.few_shot import few_shot_row
from xpert.linear_capture import AnswerBatch, answer_logits, length_batches, make_batch
from xpert.protocols import ListScore
from xpert.records import Row, Shots
from xpert.storage import hash_json, hash_texts

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["ExemplarScores"]

_BATCH_TOKENS = 4096
_CODE = 1  # raise it when the same list would get another score


class ExemplarScores:
    """Scores ordered lists of shots on `queries`, which carry answers; each distinct list is read once.

    Cost of a list: one pass over its exemplars and, behind them, over every query with its answer. `folder` keeps the
    scores of finished lists, so that a search goes on where it was stopped; None keeps them in memory alone. `share`
    off reads every prompt whole, which takes longer for the same scores. Raises BadInput where a prompt and its answer
    are longer than the model's context or `max_length`: nothing is cut.
    """

    def __init__(
        self,
        lm: LanguageModel,
        shots: Shots,
        queries: Sequence[Row],
        *,
        max_length: int = 1024,
        folder: Path | None = None,
        share: bool = True,
    ) -> None:
        self.lm = lm
        self.shots = shots
        self.queries = tuple(queries)
        self.limit = context_limit(lm, max_length)
        self.share = share
        self.read = 0
        """Lists that the model read, those found finished left out."""
        content = hash_texts(text for row in queries for text in (row.prompt, row.response))
        key = hash_json([_CODE, lm.fingerprint, str(lm.dtype), self.limit, shots.fingerprint, content])
        self._file = folder / f"{key[:32]}.jsonl" if folder is not None else None
        self._known = _read(self._file)

    def __call__(self, rows: Sequence[int]) -> ListScore:
        order = tuple(int(row) for row in rows)
        found = self._known.get(order)
        if found is None:
            found = self._known[order] = self._score(order)
            self.read += 1
            if self._file is not None:
                _append(self._file, order, found)
        return found

    def check(self, count: int) -> None:
        """Raises BadInput where a list of the `count` longest shots leaves no room for the longest query."""
        lengths = [len(ids) for ids, _ in encode_examples(self.lm.tokenizer, self.shots.rows)]
        longest = np.argsort(-np.array(lengths), kind="stable")[:count]
        self._encode(tuple(int(row) for row in longest))

    def _score(self, order: tuple[int, ...]) -> ListScore:
        examples = self._encode(order)
        shared = shared_prefix(examples) if self.share else 0
        means = np.zeros(len(examples))
        exact = np.zeros(len(examples), dtype=bool)
        with torch.inference_mode():
            cache = self._prefix(examples[0][0][:shared]) if shared else None
            rest = [(ids[shared:], start - shared) for ids, start in examples]
            # Where the model's cache cannot be branched, each prompt is read whole.
            rest, shared = (rest, shared) if cache is not None else (examples, 0)
            for part in length_batches([shared + len(ids) for ids, _ in rest], _BATCH_TOKENS):
                batch = make_batch([rest[index] for index in part], self.lm.device)
                means[part], exact[part] = self._answers(batch, cache, shared)
        if not np.isfinite(means).all():
            bad = self.queries[int(np.flatnonzero(~np.isfinite(means))[0])]
            raise BadInput(
                f"the log-likelihood of query {bad.id} is not a number",
                hint="leave that row out, or use a sound base model in float32",
            )
        return ListScore(float(means.mean()), float(exact.mean()))

    def _encode(self, order: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        exemplars = [self.shots.rows[row] for row in order]
        examples = encode_examples(self.lm.tokenizer, [few_shot_row(exemplars, query) for query in self.queries])
        for query, (ids, _) in zip(self.queries, examples, strict=True):
            if len(ids) > self.limit:
                raise BadInput(
                    f"{len(order)} exemplars with query {query.id} and its answer take {len(ids):,} tokens, "
                    f"but {self.limit:,} are read",
                    hint="lower --count, raise --max-length as far as the model reads, or leave out the longest rows",
                )
        return examples

    def _prefix(self, ids: Sequence[int]) -> Any:
        """The keys and values of the ids that all prompts begin with; None where they cannot be branched."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        body = self.lm.model.base_model  # the head's logits of a prefix are of no use
        tokens = torch.tensor([ids], dtype=torch.long, device=self.lm.device)
        cache = body(input_ids=tokens, use_cache=True).past_key_values
        plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        return cache if plain else None

    def _answers(self, batch: AnswerBatch, cache: Any, shared: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Mean log-probability of an answer token, and whether all are the likeliest, per row of the batch."""
        size = len(batch.labels)
        more: dict[str, Any] = {}
        if cache is not None:
            branch = copy.deepcopy(cache)
            branch.batch_repeat_interleave(size)
            before = torch.ones(size, shared, dtype=torch.long, device=batch.labels.device)
            mask = torch.cat([before, batch.attention_mask], dim=1)
            batch, more = AnswerBatch(batch.input_ids, mask, batch.labels), {"past_key_values": branch}
        logits, targets, row = answer_logits(self.lm.model, batch, **more)
        scores = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        missed = (logits.argmax(-1) != targets).float()
        counts = batch.answer_tokens
        sums, misses = (
            torch.zeros(size, dtype=torch.float32, device=values.device).index_add(0, row, values)
            for values in (scores, missed)
        )
        return (sums / counts).double().cpu().numpy(), (misses == 0).cpu().numpy()


def shared_prefix(examples: Sequence[tuple[Sequence[int], int]]) -> int:
    """How many first ids all rows share, short of the last id of each prompt, which predicts the answer's first."""
    first = examples[0][0]
    most = min(start for _, start in examples) - 1
    for place in range(max(0, most)):
        if any(ids[place] != first[place] for ids, _ in examples):
            return place
    return max(0, most)


def _read(file: Path | None) -> dict[tuple[int, ...], ListScore]:
    """Scores kept before; a last line that a kill cut short is left out."""
    known: dict[tuple[int, ...], ListScore] = {}
    if file is None or not file.is_file():
        return known
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
            known[tuple(value["rows"])] = ListScore(value["log_likelihood"], value["accuracy"])
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(file: Path, order: tuple[int, ...], score: ListScore) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {"rows": list(order), "log_likelihood": score.log_likelihood, "accuracy": score.accuracy}
    with open(file, "a", encoding="utf-8") as stream:
        # It begins with a line break, so that a line cut short by a kill spoils no other.
        stream.write("\n" + json.dumps(line) + "\n")
