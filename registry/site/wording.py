"""How values of a registry read on its pages: texts of strangers made harmless to look at, numbers, sizes, verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from xpert.registry.card import Interval

__all__ = ["MOST_TEXT", "date", "gain", "number", "place", "seen", "shown", "size", "verdict"]

MOST_TEXT = 2_000
"""Letters of a text that are shown; a card may hold megabytes."""

# Control characters, halves of surrogate pairs, and the marks that turn the direction of the text after them: with
# those a name can be made to read as another one.
_UNSHOWABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\uffff]"
)
_UNITS = ("B", "KiB", "MiB", "GiB")


def shown(value: Any, most: int = MOST_TEXT) -> str:
    """A text in one line, cut after `most` letters; what no eye can see is shown as the replacement character."""
    text = str(value)
    cut = len(text) > most
    text = re.sub(r"\s+", " ", text[: most + 1]).strip()
    return _UNSHOWABLE.sub("�", text[:most].rstrip()) + ("…" if cut else "")


def seen(page: str) -> str:
    """A whole page with all replaced that no eye can see, but its line ends, should a template have let it through."""
    return _UNSHOWABLE.sub(lambda found: found[0] if found[0] == "\n" else "�", page)


def place(value: Any, most: int = MOST_TEXT) -> str:
    """A reference that may be a path of the machine it was made on: of a path the last part, else the text itself."""
    text = str(value)
    if text.startswith(("/", "~", "./", "../")):
        return shown(PurePosixPath(text).name or text, most)
    if re.match(r"[A-Za-z]:\\", text):
        return shown(PureWindowsPath(text).name, most)
    return shown(text, most)


def number(value: Any) -> str:
    """A number as a person reads it: `12,345`, `0.873`; a text stays as it is, None is a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(number(part) for part in value[:50])
    if isinstance(value, Mapping):
        return ", ".join(f"{shown(key, 80)} {number(part)}" for key, part in list(value.items())[:50])
    return place(value, 300)


def size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def date(created: str) -> str:
    """The day of a time such as 2026-03-01T12:00:00Z."""
    return shown(created, 40).partition("T")[0]


def gain(expert: Interval, base: Interval) -> str:
    """The difference in hundredths, with its sign; a true minus sign."""
    return f"{100 * (expert.score - base.score):+.1f}".replace("-", "−")


def verdict(one: Interval, other: Interval) -> str:
    """How the first stands to the second, by their 95 % intervals. site.js says the same of two experts."""
    if one.low > other.high:
        return "better, beyond both intervals"
    if one.high < other.low:
        return "worse, beyond both intervals"
    if one.score == other.score:
        return "equal"
    word = "better" if one.score > other.score else "worse"
    if not other.low <= one.score <= other.high and not one.low <= other.score <= one.high:
        return f"{word}, though the intervals overlap"
    return "no clear difference"
