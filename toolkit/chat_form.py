"""Rows as token ids: the one place that decides what a model sees, in training and in answering alike.

A prompt is the tokenizer's chat template with its generation prompt. An answer is the response's own tokens followed
by the template's end of turn (`<|im_end|>`, without the line break after it). Joining ids, not texts, makes a training
example begin with exactly the ids that answering feeds the model.

A tokenizer without a template gets a plain form: turns as `User: ...`, `Assistant: ...` and `System: ...`, joined by
blank lines, then `Assistant:`; the answer follows after a space and ends with the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.records import Message, Row

__all__ = [
    "answer_ids",
    "answer_lead",
    "answer_lengths",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "end_of_turn",
]

_MARK = "xpertanswerxpert"
_BATCH = 1024


@dataclass(frozen=True)
class _Form:
    """How answers are written for one tokenizer; `template` tells when it has changed."""

    template: Any
    lead: str
    end: tuple[int, ...]
    bos: tuple[int, ...]


_FORMS: WeakKeyDictionary[Any, _Form] = WeakKeyDictionary()


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The ids from which an answer to `messages` is generated. Raises BadInput where the template refuses them."""
    return tuple(_form(tokenizer).bos) + tuple(_ids(tokenizer, [_prompt_text(tokenizer, messages)])[0])


def encode_example(tokenizer: Any, row: Row, max_length: int | None = None) -> tuple[tuple[int, ...], int]:
    """A training row as (ids, answer_start): `ids[:answer_start]` is its prompt, the rest its answer.

    Longer than `max_length` it is cut at the end; nothing of the answer is left when `answer_start >= len(ids)`.
    """
    return encode_examples(tokenizer, [row], max_length)[0]


def encode_examples(
    tokenizer: Any, rows: Sequence[Row], max_length: int | None = None
) -> list[tuple[tuple[int, ...], int]]:
    """`encode_example` of many rows, tokenised in batches."""
    bos = _form(tokenizer).bos
    encoded: list[tuple[tuple[int, ...], int]] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        prompts = _ids(tokenizer, [_prompt_text(tokenizer, row.messages) for row in part])
        answers = answer_ids(tokenizer, [row.response for row in part])
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = (*bos, *prompt, *answer)
            encoded.append((ids[:max_length], len(bos) + len(prompt)))
    return encoded


def answer_ids(tokenizer: Any, responses: Sequence[str]) -> list[tuple[int, ...]]:
    """The supervised ids of each response: its tokens and the end of turn."""
    form = _form(tokenizer)
    return [(*ids, *form.end) for ids in _ids(tokenizer, [form.lead + response for response in responses])]


def answer_lengths(tokenizer: Any, responses: Iterable[str]) -> NDArray[np.int64]:
    """Supervised tokens per response, the end of turn included: int64 [n]. Tokenised in batches."""
    form = _form(tokenizer)
    lengths: list[int] = []
    batch: list[str] = []

    def flush() -> None:
        lengths.extend(len(ids) + len(form.end) for ids in _ids(tokenizer, batch))
        batch.clear()

    for response in responses:
        batch.append(form.lead + response)
        if len(batch) == _BATCH:
            flush()
    flush()
    return np.array(lengths, dtype=np.int64)


def answer_lead(tokenizer: Any) -> str:
    """What stands between a prompt and its answer: nothing in a chat template, a space in the plain form."""
    return _form(tokenizer).lead


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end every answer in training; generation should stop at the last of them."""
    return _form(tokenizer).end


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: rows longer than the model's context are the caller's matter, not a warning on stderr.
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return found


def _prompt_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if not tokenizer.chat_template:
        return "\n\n".join([*(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns), "Assistant:"])
    return _render(tokenizer, turns, add_generation_prompt=True)


def _render(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise BadInput(f"the model's chat template refuses a conversation of {roles}: {error}") from None


def _form(tokenizer: Any) -> _Form:
    form = _FORMS.get(tokenizer)
    if form is None or form.template != tokenizer.chat_template:
        form = _FORMS[tokenizer] = _template_form(tokenizer) if tokenizer.chat_template else _plain_form(tokenizer)
    return form


def _template_form(tokenizer: Any) -> _Form:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
    _, mark, after = _render(tokenizer, turns, add_generation_prompt=False).rpartition(_MARK)
    if not mark:
        raise BadInput("the model's chat template leaves the answer out", hint="use a base with another template")
    end = _ids(tokenizer, [after.rstrip()])[0] if after.strip() else _eos(tokenizer)
    return _Form(tokenizer.chat_template, "", tuple(end), ())


def _plain_form(tokenizer: Any) -> _Form:
    first = tokenizer("x")["input_ids"][:1]
    bos = (tokenizer.bos_token_id,) if first == [tokenizer.bos_token_id] else ()
    return _Form(tokenizer.chat_template, " ", tuple(_eos(tokenizer)), bos)


def _eos(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise BadInput("the model's tokenizer has no end-of-text token, so answers could not end")
    return [tokenizer.eos_token_id]
