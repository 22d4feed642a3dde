"""The forms in which instruction rows come, and how each becomes a prompt and an answer.

    messages        messages: [{role, content}, ...]                      (OpenAI)
    conversations   conversations: [{from, value}, ...]                   (ShareGPT)
    alpaca          instruction, input, output
    completion      prompt, completion; each a text or a list of turns    (trl)
    question        question, answer

The last assistant turn is the answer; all turns before it are the prompt. A form is recognised by its columns, once
per set of columns. `RowParser` holds one source's settings: a forced form, and columns that bear other names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xpert.errors import BadInput, unknown
from xpert.records import Message

__all__ = ["FORMS", "Form", "Parsed", "RowParser", "Unfit", "form_summary", "parse_mapping"]


class Unfit(Exception):
    """A row that cannot be learned from; the message is the reason, in a few words."""


class Parsed(NamedTuple):
    """`turns` are the turns before the answer, unless they are one single user message: then None."""

    prompt: str
    response: str
    turns: tuple[Message, ...] | None


@dataclass(frozen=True)
class Form:
    """A row form: its names, and for each part of a row the columns that may hold it, the usual one first."""

    name: str
    aliases: tuple[str, ...]
    asked: tuple[str, ...]
    answered: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("messages", ("openai", "chat"), asked=("messages",)),
        Form("conversations", ("sharegpt",), asked=("conversations", "conversation")),
        Form("alpaca", ("instruction",), ("instruction",), ("output", "response"), ("input", "context")),
        Form("completion", ("prompt",), ("prompt",), ("completion", "response")),
        Form("question", ("qa",), ("question",), ("answer",)),
    )
}
_BY_NAME = {name: form for form in FORMS.values() for name in (form.name, *form.aliases)}

# What --map may name: parts of any form, and the columns that go with a row.
_ASKED = ("prompt", "instruction", "question", "messages", "conversations")
_ANSWERED = ("response", "output", "completion", "answer")
SLOTS = (*_ASKED, *_ANSWERED, "input", "id", "skill")

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

Parse = Callable[[Mapping[str, Any]], Parsed]


class ParsedBlock(NamedTuple):
    """Rows of one block, column by column; each prompt is one single user message."""

    prompts: list[str]
    responses: list[str]
    ids: list[str | None]
    skills: list[str | None]


def form_summary() -> str:
    """The known forms in one line, for messages."""
    parts = []
    for form in FORMS.values():
        columns = "/".join(column[0] for column in (form.asked, form.extra, form.answered) if column)
        parts.append(columns)
    return ", ".join(parts)


def parse_mapping(entries: Iterable[str]) -> dict[str, str]:
    """`("prompt=q", "response=a")` as {part: column}; raises BadInput for an unknown part or an entry without `=`."""
    mapping = {}
    for entry in entries:
        if not entry.strip():
            continue
        part, equals, column = (piece.strip() for piece in entry.partition("="))
        if not equals or not column:
            raise BadInput(
                f"--map {entry!r} is not PART=COLUMN", hint="write for example --map prompt=ask,response=reply"
            )
        if part not in SLOTS:
            raise unknown("part of --map", part, SLOTS)
        mapping[part] = column
    return mapping


class RowParser:
    """Turns the rows of one source into `Parsed`; counts the forms it met in `forms`.

    With `need_answer=False` a row may end before an answer: its response is then the empty text.
    """

    def __init__(
        self, form: str | None = None, mapping: Mapping[str, str] | None = None, *, need_answer: bool = True
    ) -> None:
        self.mapping = dict(mapping or {})
        self.need_answer = need_answer
        self.forms: Counter[str] = Counter()
        self.columns: dict[str, None] = {}  # every column name met, in order
        if form is not None and form not in _BY_NAME:
            raise unknown("format", form, FORMS)
        self._form = _BY_NAME[form] if form is not None else self._implied_form()
        self._parsers: dict[tuple[str, ...], tuple[str, Parse]] = {}
        self._plain: dict[Parse, tuple[str, str | None, str | None]] = {}  # the columns of parsers of plain texts

    def parse(self, row: Any) -> Parsed:
        """Raises Unfit, with the reason."""
        if type(row) is not dict:
            raise Unfit(f"is {_kind(row)}, not an object with columns")
        found = self._found(tuple(row))
        parsed = found[1](row)
        self.forms[found[0]] += 1
        return parsed

    def parse_block(self, values: list[Any]) -> ParsedBlock | None:
        """Many rows at once, column by column, with the same result as `parse` one by one.

        None where the rows differ in their columns, are not plain texts, or one of them lacks something.
        """
        if not values or set(map(type, values)) != {dict} or len(columns := set(map(tuple, values))) != 1:
            return None
        found = self._found(columns.pop())
        plain = self._plain.get(found[1])
        if plain is None:
            return None
        asked, given, answered = (None if name is None else [row[name] for row in values] for name in plain)
        if asked is None or answered is None or not (_all_texts(asked) and _all_texts(answered)):
            return None
        if given is not None:
            if set(map(type, given)) != {str}:
                return None
            pairs = zip(asked, given, strict=True)
            asked = [f"{text}\n\n{more}" if more and not more.isspace() else text for text, more in pairs]
        self.forms[found[0]] += len(values)
        return ParsedBlock(asked, answered, list(map(self.id_of, values)), list(map(self.skill_of, values)))

    def id_of(self, row: Mapping[str, Any]) -> str | None:
        """The row's own id, where it has one that is a text or a whole number."""
        value = row.get(self.mapping.get("id", "id"))
        if type(value) is str:
            return value.strip() or None
        return str(value) if type(value) is int else None

    def skill_of(self, row: Mapping[str, Any]) -> str | None:
        value = row.get(self.mapping.get("skill", "skill"))
        if type(value) is str:
            return value.strip() or None
        return str(value) if type(value) is int else None

    def _found(self, columns: tuple[str, ...]) -> tuple[str, Parse]:
        found = self._parsers.get(columns)
        if found is None:
            found = self._parsers[columns] = self._recognise(columns)
        return found

    def _implied_form(self) -> Form | None:
        """The form that the mapped parts belong to; None where the columns must tell."""
        parts = self.mapping.keys()
        for names, form in (
            (("messages",), "messages"),
            (("conversations",), "conversations"),
            (("instruction", "input", "output"), "alpaca"),
            (("question", "answer"), "question"),
            (("prompt", "response", "completion"), "completion"),
        ):
            if any(name in parts for name in names):
                return FORMS[form]
        return None

    def _recognise(self, columns: tuple[str, ...]) -> tuple[str, Parse]:
        self.columns.update(dict.fromkeys(columns))
        for form in [self._form] if self._form else FORMS.values():
            asked = self._column(columns, form.asked, _ASKED)
            answered = self._column(columns, form.answered, _ANSWERED)
            if asked is None or (form.answered and answered is None and self.need_answer):
                continue
            if form.name in ("messages", "conversations"):
                return form.name, _turns_parser(asked, self.need_answer)
            given = self._column(columns, form.extra, ("input",))
            make = _completion_parser if form.name == "completion" else _text_parser
            parse = make(asked, given, answered, self.need_answer)
            self._plain[parse] = (asked, given, answered)
            return form.name, parse
        reason = f"has no {self._wanted()}: its columns are {', '.join(columns) or 'none'}"

        def unfit(row: Mapping[str, Any]) -> Parsed:
            raise Unfit(reason)

        return "none", unfit

    def _wanted(self) -> str:
        if self._form is None:
            return "known form"
        asked = next((self.mapping[part] for part in _ASKED if part in self.mapping), self._form.asked[0])
        usual = self._form.answered[0] if self._form.answered else None
        answered = next((self.mapping[part] for part in _ANSWERED if part in self.mapping), usual)
        return " and ".join(repr(column) for column in (asked, answered) if column)

    def _column(self, columns: Collection[str], usual: Sequence[str], parts: Sequence[str]) -> str | None:
        """The column that holds a part: the mapped one alone where --map names one."""
        if not usual:
            return None
        for part in parts:
            if part in self.mapping:
                return self.mapping[part] if self.mapping[part] in columns else None
        return next((name for name in usual if name in columns), None)


def _text_parser(asked: str, given: str | None, answered: str | None, need_answer: bool) -> Parse:
    def parse(row: Mapping[str, Any]) -> Parsed:
        prompt = row[asked]
        if type(prompt) is not str:
            prompt = _text(prompt, asked)
        if given is not None:
            more = row.get(given)
            if more:
                if type(more) is not str:
                    more = _text(more, given)
                if not more.isspace():
                    prompt = f"{prompt}\n\n{more}" if prompt and not prompt.isspace() else more
        response = row[answered] if answered is not None else ""
        if type(response) is not str:
            response = _text(response, answered)
        return _checked(prompt, response, None, need_answer)

    return parse


def _completion_parser(asked: str, given: str | None, answered: str | None, need_answer: bool) -> Parse:
    plain = _text_parser(asked, given, answered, need_answer)

    def parse(row: Mapping[str, Any]) -> Parsed:
        prompt, response = row[asked], row[answered] if answered is not None else ""
        if type(prompt) is not list and type(response) is not list:
            return plain(row)
        turns = _turns(prompt, asked) if type(prompt) is list else [Message("user", _text(prompt, asked))]
        if type(response) is list:
            turns += _turns(response, str(answered))
        else:
            text = _text(response, str(answered))
            if text:
                turns.append(Message("assistant", text))
        return _split(turns, need_answer)

    return parse


def _turns_parser(column: str, need_answer: bool) -> Parse:
    def parse(row: Mapping[str, Any]) -> Parsed:
        value = row[column]
        if type(value) is str and value.lstrip().startswith("["):  # CSV and some parquet files hold turns as JSON text
            try:
                value = json.loads(value)
            except ValueError:
                raise Unfit(f"{column} is a text that is not valid JSON") from None
        return _split(_turns(value, column), need_answer)

    return parse


def _split(turns: list[Message], need_answer: bool) -> Parsed:
    if not turns:
        raise Unfit("has no turns")
    if turns[-1].role == "assistant":
        before, response = turns[:-1], turns[-1].content
    elif need_answer:
        raise Unfit(f"its last turn is the {turns[-1].role}'s, so it has no answer")
    else:
        before, response = turns, ""
    prompt = "\n\n".join(turn.content for turn in before)
    single = len(before) == 1 and before[0].role == "user"
    if before and not any(turn.role in ("user", "tool") for turn in before):
        raise Unfit("has no prompt: no turn of the user comes before the answer")
    return _checked(prompt, response, None if single else tuple(before), need_answer)


def _checked(prompt: str, response: str, turns: tuple[Message, ...] | None, need_answer: bool) -> Parsed:
    if not prompt or prompt.isspace():
        raise Unfit("has no prompt")
    if not response or response.isspace():
        if need_answer:
            raise Unfit("has no answer")
        response = ""
    return Parsed(prompt, response, turns)


def _turns(value: Any, column: str) -> list[Message]:
    if type(value) is not list:
        raise Unfit(f"{column} is {_kind(value)}, not a list of turns")
    return [_turn(item, number, column) for number, item in enumerate(value, 1)]


def _turn(item: Any, number: int, column: str) -> Message:
    if type(item) is not dict:
        raise Unfit(f"turn {number} of {column} is {_kind(item)}, not a role and a content")
    name = item.get("role", item.get("from"))
    role = _ROLES.get(name.lower()) if type(name) is str else None
    if role is None:
        raise Unfit(f"turn {number} of {column} has the unknown role {name!r}")
    content = item.get("content", item.get("value"))
    if type(content) is list:
        content = _joined_parts(content, number)
    if content is None and (item.get("tool_calls") or item.get("function_call")):
        raise Unfit(f"turn {number} of {column} is a tool call without text")
    if type(content) is not str:
        raise Unfit(f"turn {number} of {column} is {_kind(content)}, not a text")
    return Message(role, content)


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = []
    for part in parts:
        if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
            kind = part.get("type") if type(part) is dict else _kind(part)
            raise Unfit(f"turn {number} holds a part that is not text ({kind})")
        texts.append(part["text"])
    return "".join(texts)


def _text(value: Any, column: str | None) -> str:
    if type(value) is str:
        return value
    if value is None:
        return ""
    if type(value) in (int, float):
        return str(value)
    raise Unfit(f"{column} is {_kind(value)}, not a text")


def _all_texts(values: list[Any]) -> bool:
    """Whether all are texts, and none is blank."""
    return set(map(type, values)) == {str} and all(values) and not any(map(str.isspace, values))


def _kind(value: Any) -> str:
    names = {type(None): "empty", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "an object")
