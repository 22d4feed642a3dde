"""What two replies are compared by: the answer in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xpert.experts.metrics import choice_index, choice_letter, last_number, normalise
from xpert.protocols import Question

__all__ = ["BY", "Reader", "lettered_choices", "reader"]

BY = ("auto", "whole", "choice", "number", "last-line")

# "A. Paris", "(B) Rome", "C: Oslo" at the beginning of a line
_OPTION = re.compile(r"^[ \t]*(\()?([A-Z])(?(1)\)|[.):])[ \t]+(\S.*)$", re.MULTILINE)
_TAIL = 60
"""Characters at the end of a line in which a last number is looked for."""
_ENDS_IN_NUMBER = re.compile(r"\d[\d,.]*\s*(?:%|°\s*\w?|[\w$€£/]{0,12})?[\s.!)}\]*$]*$")


@dataclass(frozen=True)
class Reader:
    """Replies -> what they answer; "" where a reply answers nothing. `by`: how it is found, never "auto"."""

    by: str
    read: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.read(text)


def reader(by: str, question: Question, texts: Sequence[str]) -> Reader:
    """How the answers to a question are read.

    auto: the choice, where the question has choices or lettered options; else the last number, where the last line of
    every reply ends in one; else the whole reply, where all are of one line; else the last line.
    """
    choices = question.choices or lettered_choices(question.messages[-1].content)
    if by == "auto":
        lines = [_last_line(text) for text in texts if text.strip()]
        if choices:
            by = "choice"
        elif lines and all(_ENDS_IN_NUMBER.search(line[-_TAIL:]) for line in lines):
            by = "number"
        else:
            by = "whole" if all(text.strip() == _last_line(text) for text in texts) else "last-line"
    readers: dict[str, Callable[[str], str]] = {
        "whole": normalise,
        "choice": lambda text: _choice(text, choices),
        "number": _number,
        "last-line": lambda text: normalise(_last_line(text)),
    }
    return Reader(by, readers[by])


def lettered_choices(prompt: str) -> tuple[str, ...]:
    """The texts of the options A, B, ... that stand in a prompt, a line each; () where there are not two of them."""
    return tuple(match[3].rstrip() for match in option_lines(prompt))


def option_lines(prompt: str) -> list[re.Match[str]]:
    """The lines of the last list of options in a prompt; group 3 is an option's text."""
    found: list[re.Match[str]] = []
    best: list[re.Match[str]] = []
    for match in _OPTION.finditer(prompt):
        if match[2] == "A":
            found = [match]
        elif found and ord(match[2]) == ord("A") + len(found):
            found = [*found, match]
        else:
            found = []
        if len(found) > 1:
            best = found
    return best


def _choice(text: str, choices: Sequence[str]) -> str:
    """A choice as its letter, whether a reply names it by letter or text; "" for a reply that names none or two."""
    if not choices:
        return choice_letter(text) or ""
    line = _last_line(text)
    index = choice_index(text, choices)
    if index is None:
        index = choice_index(line, choices)
    if index is None:
        folded = normalise(line)
        named = [
            place
            for place, choice in enumerate(choices)
            if normalise(choice) and re.search(rf"(?<!\w){re.escape(normalise(choice))}(?!\w)", folded)
        ]
        index = named[0] if len(named) == 1 else None
    return "" if index is None else chr(ord("A") + index)


def _number(text: str) -> str:
    found = last_number(text)
    return "" if found is None else f"{found:.9g}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
