"""Small files read whole: shots, prompts and suites, in the same sources and row forms as a pool.

Where a pool drops a row that cannot be used, these refuse the file and name the line: each row was written by hand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, unknown
from xpert.readers import EXTENSIONS, Source, open_source
from xpert.records import Message, Row, Shots, SuiteItem
from xpert.row_forms import Parsed, RowParser, Unfit
from xpert.storage import hash_json

__all__ = ["METRICS", "Suite", "read_prompts", "read_rows", "read_shots", "read_suite"]

METRICS = ("exact", "choice", "number", "f1", "chrf", "rougeL", "set", "exec", "contains")


@dataclass(frozen=True)
class Suite:
    """Test items in file order. `fingerprint` is a hash of what decides a score; `name` comes from the file's name."""

    items: tuple[SuiteItem, ...]
    fingerprint: str
    name: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[SuiteItem]:
        return iter(self.items)


def read_rows(
    path: str | Path,
    *,
    form: str | None = None,
    mapping: Mapping[str, str] | None = None,
    need_answer: bool = True,
) -> list[Row]:
    """All rows of a source, in memory. Raises BadInput naming the first row that cannot be used.

    With `need_answer=False` a row may lack an answer: its response is then the empty text.
    """
    source = open_source(path)
    parser = RowParser(form, mapping, need_answer=need_answer)
    rows = [_row(source, parser, line, value, fault) for line, value, fault in _values(source)]
    if not rows:
        raise BadInput("holds no rows", where=source.where, hint="it must hold at least one")
    return _with_unique_ids(rows, source.name)


def read_shots(path: str | Path, *, need_answers: bool = True) -> Shots:
    """The K labelled examples of a task. Raises BadInput where one lacks a prompt, or an answer that is needed."""
    return Shots(tuple(read_rows(path, need_answer=need_answers)))


def read_prompts(path: str | Path) -> list[Row]:
    """Rows to be answered or routed; those that carry an answer keep it as their response."""
    return read_rows(path, need_answer=False)


def read_suite(path: str | Path, *, skip_metrics: Collection[str] = ()) -> Suite:
    """Test items: rows with `answers`, `metric` (default exact), `skill` (default all), optional `choices` and `probe`.

    `answers` may be a list or one text, and is the row's answer where it is missing. Rows of one skill with the same
    `probe` ask for one thing in several ways. Rows scored by one of `skip_metrics` are left out; raises BadInput where
    no other is left.
    """
    rows = read_rows(path, need_answer=False)
    items = tuple(
        _suite_item(row, number, str(path))
        for number, row in enumerate(rows, 1)
        if row.columns.get("metric") not in skip_metrics
    )
    if not items:
        raise BadInput("every item is left out", where=str(path), hint="check --skip-metric")
    content = [
        [[turn.role, turn.content] for turn in item.row.messages]
        + [list(item.answers), item.metric, item.skill, list(item.choices or ())]
        + ([item.probe] if item.probe else [])  # suites without probes keep the fingerprint they had
        for item in items
    ]
    return Suite(items, hash_json(content), _stem(Path(path).name))


def _values(source: Source) -> Iterator[tuple[int, Any, str | None]]:
    for block in source.blocks():
        for position, (line, value) in enumerate(zip(block.lines, block.values, strict=True)):
            yield line, value, block.faults.get(position)


def _row(source: Source, parser: RowParser, line: int, value: Any, fault: str | None) -> Row:
    try:
        if fault:
            raise Unfit(fault)
        parsed: Parsed = parser.parse(value)
    except Unfit as reason:
        raise BadInput(f"line {line} {reason}", where=source.where, hint="mend or delete that row") from None
    turns = parsed.turns if parsed.turns is not None else (Message("user", parsed.prompt),)
    return Row(parser.id_of(value) or f"{source.name}:{line}", turns, parsed.response, parser.skill_of(value), value)


def _with_unique_ids(rows: list[Row], name: str) -> list[Row]:
    seen: set[str] = set()
    unique = []
    for number, row in enumerate(rows, 1):
        label = row.id if row.id not in seen else f"{row.id}~{name}:{number}"
        seen.add(label)
        unique.append(row if label == row.id else Row(label, row.messages, row.response, row.skill, row.columns))
    return unique


def _suite_item(row: Row, number: int, where: str) -> SuiteItem:
    columns = row.columns
    metric = columns.get("metric") or "exact"
    if metric not in METRICS:
        raise unknown("metric", str(metric), METRICS, where=f"{where}, row {number}")
    answers = _texts(columns.get("answers"), "answers", where, number) or ((row.response,) if row.response else ())
    if not answers:
        raise BadInput(f"row {number} has no answers", where=where, hint='add "answers": ["..."]')
    choices = _texts(columns.get("choices"), "choices", where, number) or None
    if choices and not any(_among(answer, choices) for answer in answers):
        raise BadInput(
            f"row {number} has no answer among its choices",
            where=where,
            hint="write the right choice as it stands there, or its letter",
        )
    if not row.response:
        row = Row(row.id, row.messages, answers[0], row.skill, columns)
    return SuiteItem(row, answers, metric, row.skill or "all", choices, _probe(columns.get("probe"), number, where))


def _probe(value: Any, number: int, where: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadInput(f"row {number} has a probe that is no text", where=where, hint='write "probe": "..."')
    return str(value).strip()


def _among(answer: str, choices: tuple[str, ...]) -> bool:
    """Is the answer one of the choices, or the letter of one's place?"""
    letter = ord(answer.strip().upper()) - ord("A") if len(answer.strip()) == 1 else -1
    return answer in choices or 0 <= letter < len(choices)


def _texts(value: Any, column: str, where: str, number: int) -> tuple[str, ...]:
    """A column that holds a text, a number, or a list of them."""
    if value is None:
        return ()
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise BadInput(
                f"row {number} has {column} that are not texts", where=where, hint=f'write "{column}": ["..."]'
            )
        if str(item).strip():
            texts.append(str(item))
    return tuple(texts)


def _stem(name: str) -> str:
    extension = max((e for e in EXTENSIONS if name.lower().endswith(e)), key=len, default="")
    return name[: len(name) - len(extension)] or name
