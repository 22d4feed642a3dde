"""A language model's rating of each turn of a row, from 1 to 6, read off its prediction of the next token.

The model is asked in words for one number; the rating is the mean of 1..6 under the six numbers' own probabilities, so
that it is finer than any answer it would write. Source: Liu et al. 2024, arXiv:2312.15685 (Deita).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.answer_losses import context_limit, refuse_nan
from xpert.chat_form import answer_lead, encode_prompt
from xpert.errors import BadInput
from xpert.protocols import RowWorker
from xpert.records import Message, Row

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["MOST_TURNS", "QUESTIONS", "RatedTurns", "number_tokens", "turns"]

MOST_TURNS = 16
"""How many turns of a row are rated, from the first on."""
NUMBERS = tuple("123456")
_BATCH_TOKENS = 4096

QUESTIONS: dict[str, str] = {
    "complexity": (
        "Below is a request that somebody sent to an assistant. Rate how complex it is: how much knowledge, reasoning "
        "and care it takes to answer it well. 1 means trivial, 6 means as demanding as requests get.\n\n"
        "Request:\n{prompt}\n\nReply with one number from 1 to 6 and nothing else."
    ),
    "quality": (
        "Below are a request that somebody sent to an assistant, and the assistant's answer. Rate the answer's "
        "quality: is it right, helpful, to the point and complete? 1 means useless, 6 means that it could hardly be "
        "better.\n\nRequest:\n{prompt}\n\nAnswer:\n{response}\n\nReply with one number from 1 to 6 and nothing else."
    ),
}
"""What the model is asked; `{prompt}` and `{response}` stand for the turn's texts."""


@dataclass(frozen=True)
class RatedTurns:
    """A pass: `model` rates each turn (a user's message and the assistant's answer) of a row.

    Arrays per row: `ratings` float32 [16], in 1..6, NaN past the last turn; `turns` int32, how many there are (rows of
    more are rated on their first 16); `cut` bool, whether a text was cut. `question` holds `{prompt}` and may hold
    `{response}`; it is asked in the model's chat form, or, where `plain`, given as it stands. A turn's texts are cut at
    their ends to `max_length` tokens together, the longer one first, and further where the model's context is less;
    what is asked never is. Raises BadInput where the tokenizer does not write the six numbers as one token each, the
    context has no room, or a rating is no number. Cost: one forward pass a turn.
    """

    model: str
    question: str
    plain: bool = False
    max_length: int = 1024
    dtype: str = "auto"
    name: ClassVar[str] = "rated-turns"
    shard_rows: ClassVar[int] = 64

    @property
    def key(self) -> Mapping[str, Any]:
        from xpert.language_model import model_fingerprint

        return {
            "model": model_fingerprint(self.model),
            "question": self.question,
            "plain": self.plain,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "form": 1,
        }

    def open(self, device: str) -> RowWorker:
        from xpert.language_model import load_model

        asker = _Asker(load_model(self.model, device=device, dtype=self.dtype), self)

        def work(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
            asked, place = [], []
            cut = np.zeros(len(rows), bool)
            for index, row in enumerate(rows):
                for turn, (prompt, response) in enumerate(turns(row)[:MOST_TURNS]):
                    ids, shortened = asker.ask(prompt, response)
                    asked.append(ids)
                    place.append((index, turn))
                    cut[index] |= shortened
            ratings = np.full((len(rows), MOST_TURNS), np.nan, np.float32)
            if asked:
                found = asker.rate(asked)
                refuse_nan(found, np.ones(len(found), bool), [rows[index] for index, _ in place], "the rating")
                ratings[tuple(np.array(place).T)] = found
            counts = np.array([len(turns(row)) for row in rows], np.int32)
            return {"ratings": ratings, "turns": counts, "cut": cut}

        return work


def turns(row: Row) -> list[tuple[str, str]]:
    """(what was asked, what was answered) for each turn; messages of other roles belong to the turn they precede."""
    found: list[tuple[str, str]] = []
    asked: list[str] = []
    for message in (*row.messages, Message("assistant", row.response)):
        if message.role == "assistant":
            found.append(("\n\n".join(asked), message.content))
            asked = []
        else:
            asked.append(message.content)
    return found


def number_tokens(tokenizer: Any, lead: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids that stand before each of the six numbers, the ids [6] of the numbers themselves), written after `lead`.

    Some tokenizers put a mark of a word's beginning before a number; it is the same for all six, and is given to the
    model. Raises BadInput where a number is not one token of its own.
    """
    written = [tuple(tokenizer(lead + number, add_special_tokens=False)["input_ids"]) for number in NUMBERS]
    before, last = {ids[:-1] for ids in written}, [ids[-1] for ids in written if ids]
    known = len(set(last)) == len(NUMBERS) and tokenizer.unk_token_id not in last
    if len(before) != 1 or not known:
        raise BadInput(
            "the scorer's tokenizer does not write each of the numbers 1 to 6 as a token of its own, so it cannot rate",
            where=str(getattr(tokenizer, "name_or_path", "") or "") or None,
            hint="take another scorer-model",
        )
    return before.pop(), tuple(last)


class _Asker:
    """Writes the question of one turn as ids, and rates many."""

    def __init__(self, lm: LanguageModel, task: RatedTurns) -> None:
        self.lm, self.task = lm, task
        before, self.numbers = number_tokens(lm.tokenizer, "" if task.plain else answer_lead(lm.tokenizer))
        self.before = before
        self.limit = context_limit(lm, 1 << 30) - 1  # the token that is asked for has its place too
        self.room = min(task.max_length, self.limit - len(self._encode("", "")))
        if self.room < 1:
            raise BadInput(f"the question alone fills the scorer's context of {self.limit:,} tokens", where=task.model)

    def ask(self, prompt: str, response: str) -> tuple[tuple[int, ...], bool]:
        """The ids after which a number comes, and whether a text was cut."""
        room, shortened = self.room, False
        while True:
            first, second, cut = self._shorten(prompt, response, room)
            shortened |= cut
            ids = self._encode(first, second)
            over = len(ids) - self.limit
            if over <= 0 or room == 0:
                break
            # Texts that were cut may take a few tokens more where they meet the question.
            room = max(0, room - over)
        if over > 0:
            raise BadInput(f"the question does not fit the scorer's context of {self.limit:,}", where=self.task.model)
        return ids, shortened

    def rate(self, asked: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """float32 [m]: sum over k of k times the probability of the number k among the six."""
        import torch

        from xpert.linear_capture import answer_logits, length_batches, make_batch

        found = np.empty(len(asked), np.float32)
        weights = torch.arange(1, len(NUMBERS) + 1, dtype=torch.float32, device=self.lm.device)
        with torch.inference_mode():
            for part in length_batches([len(ids) for ids in asked], _BATCH_TOKENS):
                # The token after the question is what the logits are wanted for; any would do.
                examples = [((*asked[index], self.numbers[0]), len(asked[index])) for index in part]
                logits, _, _ = answer_logits(self.lm.model, make_batch(examples, self.lm.device))
                p = logits[:, list(self.numbers)].float().softmax(-1)
                found[part] = (p @ weights).cpu().numpy()
        return found

    def _encode(self, prompt: str, response: str) -> tuple[int, ...]:
        text = _fill(self.task.question, prompt, response)
        tokenizer = self.lm.tokenizer
        if self.task.plain:
            return (*tokenizer(text, verbose=False)["input_ids"], *self.before)
        return (*encode_prompt(tokenizer, (Message("user", text),)), *self.before)

    def _shorten(self, prompt: str, response: str, room: int) -> tuple[str, str, bool]:
        """The texts cut to `room` tokens together: each keeps half of it, or what the other leaves over."""
        tokenizer = self.lm.tokenizer
        reads_response = "{response}" in self.task.question
        texts = [prompt, response] if reads_response else [prompt]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = [len(part) for part in ids]
        if sum(lengths) <= room:
            return prompt, response, False
        half = room // 2
        if not reads_response:
            keep = [room]
        elif lengths[0] <= half:
            keep = [lengths[0], room - lengths[0]]
        elif lengths[1] <= half:
            keep = [room - lengths[1], lengths[1]]
        else:
            keep = [room - half, half]
        cut = [
            text if length <= kept else tokenizer.decode(part[:kept], skip_special_tokens=False)
            for text, part, length, kept in zip(texts, ids, lengths, keep, strict=True)
        ]
        return cut[0], cut[1] if reads_response else response, True


def _fill(question: str, prompt: str, response: str) -> str:
    """The question with the texts in their places; braces inside the texts mean nothing."""
    pieces = question.split("{prompt}")
    return prompt.join(piece.replace("{response}", response) for piece in pieces)
