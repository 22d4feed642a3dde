"""Few-shot prompts: exemplars as turns of a conversation before the question, in the model's own chat form."""

from __future__ import annotations

from collections.abc import Sequence

from xpert.records import Message, Row

__all__ = ["exemplar_text", "few_shot_messages", "few_shot_row"]


def few_shot_messages(exemplars: Sequence[Row], query: Row) -> tuple[Message, ...]:
    """The turns to be answered: each exemplar's turns and its answer as the assistant's, then the query's turns.

    The order is the one given, so that the last exemplar stands next to the question. A conversation has one system
    turn, at its beginning: the query's where it opens with one, else that of the last exemplar which does; those of
    the other exemplars are left out, with the settings of their own conversations that they speak of.
    """
    system: tuple[Message, ...] = ()
    turns: list[Message] = []
    for row in exemplars:
        opening, rest = _opening(row)
        system = opening or system
        turns += [*rest, Message("assistant", row.response)]
    opening, rest = _opening(query)
    return (*(opening or system), *turns, *rest)


def few_shot_row(exemplars: Sequence[Row], query: Row) -> Row:
    """The query as a row with the exemplars before it and its own answer."""
    return Row(query.id, few_shot_messages(exemplars, query), query.response, query.skill)


def exemplar_text(exemplars: Sequence[Row]) -> str:
    """A list of exemplars as one text, for an embedder: prompts and answers in their order."""
    return "\n\n".join(f"{row.prompt}\n{row.response}" for row in exemplars)


def _opening(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(the system turn at its beginning or nothing, the turns after it)"""
    opens = row.messages[0].role == "system"
    return (row.messages[:1], row.messages[1:]) if opens else ((), row.messages)
