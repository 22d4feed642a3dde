"""The words of the data: messages, rows, shots, suite items and budgets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xpert.errors import BadInput
from xpert.storage import hash_texts

__all__ = ["Budget", "Message", "Row", "Shots", "SuiteItem", "licence_of"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction row in normal form: what is asked, and the answer to learn.

    `messages` are all turns before the answer. `columns` are the row as its source wrote it.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    skill: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text of all turns before the answer, joined by blank lines."""
        return "\n\n".join(message.content for message in self.messages)

    @property
    def licence(self) -> str | None:
        """What its source says in a column `licence` or `license`, in any case."""
        return licence_of(self.columns)

    def chat(self) -> list[dict[str, str]]:
        """The turns before the answer, as a chat template takes them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def licence_of(columns: Mapping[str, Any]) -> str | None:
    """The value of a column `licence` or `license`, in any case; None where there is none."""
    named = {key.lower(): value for key, value in columns.items()}
    found = named.get("licence") or named.get("license")
    return str(found) if found else None


@dataclass(frozen=True, slots=True)
class Shots:
    """The K examples of the target task: the anchor of a selection. An unlabelled one has the empty answer."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def unanswered(self) -> tuple[Row, ...]:
        """Those without an answer: prompts of the task that nobody has labelled."""
        return tuple(row for row in self.rows if not row.response)

    @property
    def fingerprint(self) -> str:
        """Hash of prompts and answers, in order."""
        return hash_texts(text for row in self.rows for text in (row.prompt, row.response))


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One item of a test suite: a row, the answers that count as right, and how they are compared.

    Items of one skill and one `probe` ask for one thing in several ways.
    """

    row: Row
    answers: tuple[str, ...]
    metric: str
    skill: str
    choices: tuple[str, ...] | None = None
    probe: str | None = None


_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|k?tok|mtok|k|m)?", re.IGNORECASE)
_SCALE = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to select: rows (`1000`), a share of the pool (`5%`) or supervised tokens (`200ktok`)."""

    amount: float
    unit: str  # "rows", "share" (amount in 0..1) or "tokens"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Raises BadInput unless `text` is a positive number with an optional unit of % k m tok ktok mtok."""
        match = _BUDGET.fullmatch(text.strip())
        if match is None and text.strip().startswith("-"):
            raise BadInput(f"budget {text!r} is negative", hint="write a positive budget")
        if match is None:
            raise BadInput(
                f"budget {text!r} is not understood", hint="write rows (1000), a share (5%) or tokens (200ktok)"
            )
        number, unit = float(match["number"]), (match["unit"] or "").lower()
        if number == 0:
            raise BadInput(f"budget {text!r} selects nothing", hint="write a positive budget")
        if unit == "%":
            if number > 100:
                raise BadInput(f"budget {text!r} is more than the whole pool", hint="write at most 100%")
            return cls(number / 100, "share")
        tokens = unit.endswith("tok")
        amount = number * _SCALE[unit.removesuffix("tok")]
        if amount != int(amount):
            raise BadInput(
                f"budget {text!r} is not a whole number", hint="write rows (1000), a share (5%) or tokens (200ktok)"
            )
        return cls(amount, "tokens" if tokens else "rows")

    @property
    def in_tokens(self) -> bool:
        return self.unit == "tokens"

    def limit(self, pool_rows: int, pool_tokens: int | None = None) -> int:
        """The whole number of rows or tokens to take from a pool of this size.

        A share rounds to the nearest row, and is at least one. Raises BadInput where the pool holds less.
        """
        if self.unit == "share":
            return max(1, round(self.amount * pool_rows))
        available = pool_tokens if self.in_tokens else pool_rows
        if available is None:
            raise ValueError("a token budget needs the pool's token count")
        if self.amount > available:
            raise BadInput(
                f"the budget is {self.amount:,.0f} {self.unit}, but the pool holds {available:,}",
                hint="lower --budget, or write 100%",
            )
        return int(self.amount)

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:.0f}{'tok' if self.in_tokens else ''}"
