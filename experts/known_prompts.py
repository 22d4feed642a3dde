"""Suite items that an expert was shown in training: their scores tell what it remembers, not what it can do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xpert.errors import Corrupt
from xpert.experts.metrics import normalise
from xpert.records import SuiteItem
from xpert.registry.card import EXEMPLARS_FILE

__all__ = ["seen_in_training"]


def seen_in_training(folder: Path, items: Sequence[SuiteItem]) -> list[SuiteItem]:
    """The items whose prompt stands among the expert's exemplars, but for case, space and edge punctuation.

    The exemplars are a sample of what it was trained on, so that more may have been seen. Raises Corrupt where their
    file cannot be read; an expert without one has nothing to be compared with.
    """
    path = folder / EXEMPLARS_FILE
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        known = {normalise(str(json.loads(line)["prompt"])) for line in lines if line.strip()}
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"the exemplars cannot be read ({error})", where=str(path), hint="train the expert again"
        ) from None
    return [item for item in items if normalise(item.row.prompt) in known]
