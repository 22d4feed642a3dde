"""JSON that comes from others: exactly what the standard allows, and no deeper than anything of ours is.

Python's own parser takes NaN, numbers beyond the range, repeated keys, halves of surrogate pairs and nesting up to its
stack; each of them breaks something later on, such as writing the value out again.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from xpert.errors import Corrupt

__all__ = ["MOST_NESTED", "check_json_text", "parse_json"]

MOST_NESTED = 64
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
# A text runs to its quote or, where that is missing, to the end: else a search would begin anew at every quote within.
_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def parse_json(data: bytes | str, *, where: str) -> Any:
    """The value of a JSON document; raises Corrupt where it is none. Cost: two passes over the text."""
    try:
        text = data if isinstance(data, str) else data.decode()
        return check_json_text(text)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not valid JSON: {error}", where=where) from None


def check_json_text(text: str) -> Any:
    """As `parse_json`, raising ValueError."""
    if _nested(text) > MOST_NESTED:
        raise ValueError(f"nested more than {MOST_NESTED} deep")
    value = _DECODER.decode(text)
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        if _HALF_PAIR.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half of a surrogate pair")
    return value


def _nested(text: str) -> int:
    """The greatest depth of brackets outside of texts."""
    if text.count("[") + text.count("{") <= MOST_NESTED:
        return 0
    depth = most = 0
    for found in _BRACKETS.finditer(text):
        first = found.group()[0]
        if first in "[{":
            depth += 1
            if depth > most:
                most = depth
                if most > MOST_NESTED:
                    break
        elif first in "]}":
            depth -= 1
    return most


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


_DECODER = json.JSONDecoder(
    parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_without_repeats, strict=True
)
