"""Pairs of texts with the share of votes for the first: read from a file, or asked of a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, NotFound, nearest
from xpert.judges import Judge, Question
from xpert.records import Row

__all__ = ["Pair", "Side", "Votes", "ask_votes", "draw_pairs", "excerpt", "read_choice", "read_pairs"]

Side = int | str
"""One text of a pair: a pool row's index, or a text of its own."""


@dataclass(frozen=True)
class Pair:
    """Two sides and the share of votes for the first, 0 to 1."""

    a: Side
    b: Side
    p: float


def read_pairs(path: str | Path, ids: Sequence[str]) -> list[Pair]:
    """JSON lines `{"a": ..., "b": ..., "p": share of votes for a}`; for `p` also `"preferred": "a"` or `"b"`.

    A side that is a pool row's id stands for the row, one that holds a space or a line break is a text of its own;
    anything else is an id that the pool lacks, and is refused. Raises BadInput naming the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFound("no such file of pairs", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the pairs cannot be read: {error}", where=str(path)) from None
    index_of = {key: index for index, key in enumerate(ids)}
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            value = _object(line, where)
            a, b = (_side(value, name, index_of, where) for name in ("a", "b"))
            if a == b:
                raise BadInput("both sides of the pair are the same", where=where)
            pairs.append(Pair(a, b, _share(value, where)))
    if not pairs:
        raise BadInput("the file holds no pairs", where=str(path))
    return pairs


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadInput(f"not valid JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise BadInput('a line is an object such as {"a": "id1", "b": "id2", "p": 0.9}', where=where)
    return value


def _side(value: dict[str, Any], name: str, index_of: dict[str, int], where: str) -> Side:
    side = value.get(name)
    if not isinstance(side, str) or not side.strip():
        raise BadInput(f"{name!r} is {side!r}; a row id or a text is needed", where=where)
    if side in index_of:
        return index_of[side]
    if any(letter.isspace() for letter in side.strip()):
        return side
    close = nearest(side, index_of) if len(index_of) <= 10_000 else None
    hint = f"did you mean {close!r}?" if close else "rows that overlap the shots are left out of the pool"
    raise BadInput(f"{name!r} is {side!r}, which is no row of the pool", where=where, hint=hint)


def _share(value: dict[str, Any], where: str) -> float:
    if "preferred" in value and "p" not in value:
        if value["preferred"] not in ("a", "b"):
            raise BadInput(f"'preferred' is {value['preferred']!r}, not 'a' or 'b'", where=where)
        return 1.0 if value["preferred"] == "a" else 0.0
    share = value.get("p")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise BadInput(f"'p' is {share!r}; the share of votes for a is needed, 0 to 1", where=where)
    return float(share)


def draw_pairs(rows: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` different pairs of different rows, every row in about as many; all there are where those are fewer.

    Raises BadInput where the pool has one row.
    """
    if rows < 2:
        raise BadInput(f"pairs cannot be drawn from a pool of {rows} row")
    if count >= rows * (rows - 1) // 2:
        return [(a, b) for a in range(rows) for b in range(a + 1, rows)]
    drawn: dict[tuple[int, int], tuple[int, int]] = {}
    while len(drawn) < count:
        order = rng.permutation(rows).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            if len(drawn) < count:
                drawn.setdefault((min(a, b), max(a, b)), (a, b))
    return list(drawn.values())


def excerpt(row: Row, characters: int) -> str:
    """A row as a judge is shown it: prompt and answer, each cut to `characters`."""
    return f"Request: {_cut(row.prompt, characters)}\nAnswer: {_cut(row.response, characters)}"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters].rstrip() + " [...]"


_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|choice|verdict|winner|preferred|preference|better)\b[^\n.]{0,20}?(?::|\b(?i:is)\b)\W*"
    r"(?:(?i:text|option|response|answer)\W+)?([ABU])\b"
)
_LEADING = re.compile(r"\W*(?:(?:text|option|response|answer)\W+)?([ABU])(?=\W*(?:$|\n)|[.):,])", re.IGNORECASE)
_FIRST = re.compile(r"\W*(?:(?i:text|option|response)\s+([AB])\b|([AB])\s+is\b)")


def read_choice(reply: str, choices: str = "AB") -> str | None:
    """The letter a judge chose, or None where its reply does not say. What stands in <think>...</think> is passed over.

    Read are: a line (the first, else the last) that is the letter alone, also as "Text A", "[[A]]" or "A.", a first
    line that begins so; else "the answer is A" or "Verdict: A", the last one; else a reply that begins with "Text A"
    or "A is". The article in "A good text" is not a choice.
    """
    text = _THOUGHT.sub("", reply).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    named = _NAMED.findall(text)
    found = [
        *(match.group(1) for line in (lines[0], lines[-1]) if (match := _LEADING.match(line))),
        *named[-1:],
        *(match.group(1) or match.group(2) for match in [_FIRST.match(text)] if match),
    ]
    return next((str(letter).upper() for letter in found if letter.upper() in choices), None)


@dataclass(frozen=True)
class Votes:
    """What a judge said of m pairs under one question: int64 [m] votes for a and for b, and what it did not decide.

    `first_shown` and `second_shown` count the votes by the place of what was preferred: far apart, the judge looks at
    the place and not at the texts.
    """

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    first_shown: int
    second_shown: int
    undecided: int
    unreadable: int

    @property
    def share(self) -> NDArray[np.float64]:
        """float64 [m]: the share of votes for a; NaN where none was for either."""
        total = self.a + self.b
        share: NDArray[np.float64] = np.where(total > 0, self.a / np.maximum(total, 1), np.nan)
        return share


def ask_votes(
    judge: Judge,
    template: str,
    texts: Sequence[tuple[str, str]],
    *,
    votes: int = 1,
    both_orders: bool = True,
    choices: str = "AB",
    max_tokens: int = 64,
    title: str = "judgements",
) -> Votes:
    """Asks which of each pair of texts is better; `template` holds `{a}` and `{b}` for what is shown first and second.

    Both orders are asked, so that a liking for the first place cancels; with `votes` above 1 each question is asked
    that often at temperature 1. Raises BadInput where no reply at all can be read.
    """
    questions, owners = [], []
    for index, (a, b) in enumerate(texts):
        for swapped in (False, True) if both_orders else (False,):
            shown = (b, a) if swapped else (a, b)
            text = _fill(template, *shown)
            for sample in range(votes):
                questions.append(Question(text, 1.0 if votes > 1 else 0.0, max_tokens, sample))
                owners.append((index, swapped))
    replies = judge.ask(questions, title)
    counts = np.zeros((2, len(texts)), np.int64)
    shown_first = undecided = unreadable = 0
    for (index, swapped), reply in zip(owners, replies, strict=True):
        choice = read_choice(reply, choices)
        if choice is None:
            unreadable += 1
        elif choice == "U":
            undecided += 1
        else:
            shown_first += choice == "A"
            counts[int((choice == "B") != swapped), index] += 1
    if replies and unreadable == len(replies):
        said = " ".join(replies[0].split())[:80]
        raise BadInput(
            f"none of the judge's {unreadable:,} replies names one of {', '.join(choices)}; the first is {said!r}",
            where=judge.answerer.identity,
            hint="take a judge that follows instructions",
        )
    return Votes(counts[0], counts[1], shown_first, int(counts.sum()) - shown_first, undecided, unreadable)


def _fill(template: str, a: str, b: str) -> str:
    """The template with the texts in their places; braces inside the texts mean nothing."""
    return a.join(piece.replace("{b}", b) for piece in template.split("{a}"))
