"""The form of `expert.json`: its JSON Schema, the check of a card against it, and the schema as a table for people."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, Corrupt
from xpert.registry.card import SCHEMA

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

__all__ = ["card_schema", "check_card", "field_tables"]

SCHEMA_FILE = Path(__file__).with_name("expert.schema.json")
_DEEPEST = 32
_MOST_VALUES = 1_000_000
_NAMES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}


@functools.cache
def card_schema() -> Mapping[str, Any]:
    """The JSON Schema (draft 2020-12) of `expert.json`, schema 1 and 2."""
    schema: Mapping[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def check_card(value: Any, where: str) -> None:
    """Raises Corrupt unless `value`, as `json.loads` gives it, is a card; the error names the field and what is wrong.

    BadInput for a card of a newer schema. Depth and number of values are bounded first. Beyond the schema, numbers
    must be finite, and prototypes must have a label and a count each. Cost: some milliseconds a card, so that reading
    many cards (`ExpertCard.from_dict`) goes without; publishing and `verify` do it.
    """
    if not isinstance(value, Mapping) or value.get("kind") != "expert":
        raise Corrupt("not an expert card", where=where)
    number = value.get("schema")
    if isinstance(number, int) and number > SCHEMA:
        raise BadInput(f"written by a newer xpert (schema {number})", where=where, hint="upgrade xpert")
    _check_bounds(value, where)
    from jsonschema.exceptions import best_match

    # Weak kinds of error are those about a choice between forms: the error inside the form that was meant says more.
    error = best_match(_validator().iter_errors(value))
    if error is not None:
        raise Corrupt(f"{_path(error.absolute_path)} {_sentence(error)}", where=where, hint=_HINT)
    for index, part in enumerate(value.get("prototypes", ())):
        if len(part["labels"]) != len(part["counts"]):
            raise Corrupt(f"prototypes[{index}] has not one label and one count a centroid", where=where, hint=_HINT)


_HINT = "`xpert registry schema` prints the form of a card"


@functools.cache
def _validator() -> Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # A card that was not written yet holds tuples where its file holds lists.
    types = Draft202012Validator.TYPE_CHECKER.redefine("array", lambda checker, item: isinstance(item, list | tuple))
    kind = extend(Draft202012Validator, type_checker=types)  # type: ignore[no-untyped-call]  # jsonschema has no types for it
    made: Validator = kind(card_schema())
    return made


def _check_bounds(value: Any, where: str) -> None:
    """Depth, number of values, and finite numbers, without recursion."""
    waiting: list[tuple[Any, int, tuple[str | int, ...]]] = [(value, 0, ())]
    seen = 0
    while waiting:
        item, depth, path = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            raise Corrupt(f"{_path(path)} is nested more than {_DEEPEST} deep", where=where)
        if seen > _MOST_VALUES:
            raise Corrupt(f"the card holds more than {_MOST_VALUES:,} values", where=where)
        if isinstance(item, Mapping):
            waiting += [(part, depth + 1, (*path, key)) for key, part in item.items()]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1, (*path, index)) for index, part in enumerate(item)]
        elif isinstance(item, float) and not math.isfinite(item):
            raise Corrupt(f"{_path(path)} is {item}, which is not a number of JSON", where=where)


def _path(parts: Sequence[str | int]) -> str:
    """`profile.skills["a b"].expert.score`; keys are shortened, since they may be anything."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and len(part) <= 40:
            text += f".{part}" if text else part
        else:
            text += f"[{_short(part)}]"
    return text or "the card"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _sentence(error: ValidationError) -> str:
    """What is wrong with a field, in words."""
    given: Any = error.instance
    limit: Any = error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            return f"is {_short(given)}, not {' or '.join(_NAMES[kind] for kind in kinds)}"
        case "required":
            missing = next(name for name in limit if name not in given)
            return f"has no {missing!r}"
        case "additionalProperties":
            known = schema.get("properties", {})
            strange = next((name for name in given if name not in known), "")
            return f"has the unknown field {_short(strange)}"
        case "const" | "enum":
            choices = [limit] if error.validator == "const" else limit
            return f"is {_short(given)}, not {' or '.join(_short(choice) for choice in choices)}"
        case "minimum":
            return f"is {given}; the least is {limit}"
        case "maximum":
            return f"is {given}; the most is {limit}"
        case "minLength":
            return "is empty"
        case "maxLength":
            return f"is longer than {limit:,} characters"
        case "maxItems" | "maxProperties":
            return f"holds more than {limit:,} entries"
        case "pattern":
            title = schema.get("title", "form")
            if title == "Path":
                return f"names {_short(given)}, which is no plain path inside the folder"
            return (
                f"is {_short(given)}, which is no {title}" if title == "sha256" else f"is {_short(given)}, no such form"
            )
        case _:
            return f"does not fit the schema ({error.validator})"


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────


def field_tables() -> str:
    """Every field of a card as Markdown: a table of the card's own, then one for each form that several fields have."""
    schema = card_schema()
    shared = {name: form for name, form in schema["$defs"].items() if "properties" in form}
    parts = [_table(schema)]
    parts += [f"### {name}\n\n{form['description']}\n\n{_table(form)}" for name, form in shared.items()]
    return "\n".join(parts)


def _table(form: Mapping[str, Any]) -> str:
    lines = [f"| `{path}` | {kind} | {told} |" for path, kind, told in _fields(form, "")]
    return "\n".join(("| field | type | meaning |", "|---|---|---|", *lines)) + "\n"


def _fields(form: Mapping[str, Any], before: str) -> Iterator[tuple[str, str, str]]:
    for name, part in form["properties"].items():
        needed = ", required" if name in form.get("required", ()) else ""
        yield f"{before}{name}", _kind(part) + needed, part.get("description", "")
        if "properties" in part:
            yield from _fields(part, f"{before}{name}.")


def _kind(part: Mapping[str, Any]) -> str:
    """The type of a field in words; forms of their own by their names."""
    if "anyOf" in part:
        return " or ".join(_kind(choice) for choice in part["anyOf"])
    if "$ref" in part:
        return str(part["$ref"].rpartition("/")[2])
    if "const" in part or "enum" in part:
        return " or ".join(f"`{choice}`" for choice in part.get("enum", [part.get("const")]))
    if "type" not in part:
        return "any"
    names = [part["type"]] if isinstance(part["type"], str) else list(part["type"])
    inner = part.get("items") or part.get("additionalProperties")
    if isinstance(inner, Mapping) and "properties" not in part and names[0] in ("array", "object"):
        names[0] = f"{names[0]} of {_kind(inner)}"
    return " or ".join(names)
