"""Rows as token ids: what training sees begins with what answering feeds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.language_model import (
    answer_lengths,
    encode_example,
    encode_examples,
    encode_prompt,
    end_of_turn,
    load_tokenizer,
)
from xpert.records import Message, Row

# SmolLM2's own: it puts a system turn before a conversation that has none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FORMS = {"own": ..., "smollm2": SMOLLM2, "no-system": NO_SYSTEM, "plain": None}
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@pytest.fixture(scope="module", params=FORMS)
def tokenizer(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    tokenizer = load_tokenizer(str(tiny_base))
    if FORMS[request.param] is not ...:
        tokenizer.chat_template = FORMS[request.param]
    return tokenizer


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS, st.integers(1, 80))
def test_an_example_is_its_prompt_and_then_its_answer(
    tokenizer: Any, turns: list[str], response: str, limit: int
) -> None:
    roles = ["user", "assistant", "user"]
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    row = Row("a", messages, response)
    prompt = encode_prompt(tokenizer, messages)
    ids, start = encode_example(tokenizer, row)
    assert ids[:start] == prompt
    assert ids[-len(end_of_turn(tokenizer)) :] == end_of_turn(tokenizer)
    assert answer_lengths(tokenizer, [response]).tolist() == [len(ids) - start]
    assert encode_example(tokenizer, row, limit) == (ids[:limit], start)


@pytest.mark.parametrize("template", ["own", "smollm2"])
def test_the_ids_are_those_of_the_whole_conversation(tiny_base: Path, rows: list[Row], template: str) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    if FORMS[template] is not ...:
        tokenizer.chat_template = FORMS[template]
    for row in rows[:20]:
        turns = [*row.chat(), {"role": "assistant", "content": row.response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids, _ = encode_example(tokenizer, row)
        assert tokenizer.decode(ids) + "\n" == text  # the line break after the end of turn is not learned


def test_many_at_once_equal_one_by_one(tokenizer: Any, rows: list[Row]) -> None:
    singly = [encode_example(tokenizer, row, 60) for row in rows]
    assert encode_examples(tokenizer, rows, 60) == singly
    lengths = answer_lengths(tokenizer, (row.response for row in rows))
    assert lengths.dtype.name == "int64"
    assert lengths.tolist() == [len(ids) - start for ids, start in encode_examples(tokenizer, rows)]
    assert answer_lengths(tokenizer, []).tolist() == []


def test_a_template_changed_later_is_followed(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    first = encode_prompt(tokenizer, [Message("user", "hello")])
    tokenizer.chat_template = SMOLLM2
    assert len(encode_prompt(tokenizer, [Message("user", "hello")])) > len(first)


def test_a_conversation_the_template_refuses_is_named(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(BadInput, match=r"refuses a conversation of system, user: no system turns"):
        encode_prompt(tokenizer, [Message("system", "Be brief."), Message("user", "hello")])


def test_the_plain_form_is_as_documented(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = None
    row = Row("a", (Message("system", "Be brief."), Message("user", "hello")), "hi")
    ids, start = encode_example(tokenizer, row)
    assert tokenizer.decode(ids[:start]) == "System: Be brief.\n\nUser: hello\n\nAssistant:"
    assert tokenizer.decode(ids[start:]) == " hi<|im_end|>"
