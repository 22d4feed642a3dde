"""What it took to make an expert: tokens and seconds, summed over its parts as far as they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xpert.registry.card import ExpertCard

__all__ = ["Spending", "in_all", "spent_of", "spent_on_selection"]

Spending = Mapping[str, float | None]
"""`tokens` (read by a training, without padding, over all epochs) and `seconds`; None or missing: not known."""

_KEYS = ("tokens", "seconds")


def in_all(parts: Sequence[Spending]) -> dict[str, float]:
    """The sums of those keys that every part knows: a sum with a part missing would say too little."""
    found = {}
    for key in _KEYS:
        values = [part.get(key) for part in parts]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            found[key] = round(sum(known), 3)
    return found


def spent_of(card: ExpertCard) -> Spending:
    """What a card says; for cards before schema 2, what its training took, which then is all that is known."""
    if card.spent:
        return dict(card.spent)
    figures = card.training.get("figures")
    return {key: figures[key] for key in _KEYS if key in figures} if isinstance(figures, Mapping) else {}


def spent_on_selection(selection: Mapping[str, Any]) -> Spending:
    """Of a selection's manifest; rows that were not selected took nothing. Tokens its scorers read are not counted."""
    seconds = selection.get("seconds") if "config" in selection else 0
    return {"tokens": 0, "seconds": seconds}
