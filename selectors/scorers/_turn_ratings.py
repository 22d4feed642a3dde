"""What Deita's two scorers share: ratings of a row's turns by a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Floats
from xpert.rated_turns import MOST_TURNS, QUESTIONS, RatedTurns
from xpert.records import Shots
from xpert.storage import hash_file

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["TurnRatingOptions", "TurnRatings"]


@dataclass(frozen=True)
class TurnRatingOptions(Config):
    scorer_model: str | None = option(
        None, "the language model that rates: folder, hub name or .gguf; the base (--base) where none is named"
    )
    question: str | None = option(
        None,
        "a file with the words to ask instead, given as they stand, without a chat form: for a scorer that was trained "
        "on words of its own; {prompt} and {response} stand for the texts",
    )

    def to_dict(self) -> dict[str, Any]:
        """With the content of the file, so that a manifest tells one file of a name from another."""
        named = Path(self.question) if self.question else None
        content = {"question_content": hash_file(named)} if named is not None and named.is_file() else {}
        return {**super().to_dict(), **content}


class TurnRatings:
    """A scorer by one rated property; subclasses name it, and document themselves."""

    Options: ClassVar[type[Config]] = TurnRatingOptions
    needs: frozenset[str] = frozenset({"base"})
    cost: ClassVar[str] = "one forward pass of the scorer a turn, kept"
    source: ClassVar[str] = "Liu et al. 2024, arXiv:2312.15685 (Deita)"
    rates: ClassVar[str]

    def __init__(self, options: TurnRatingOptions) -> None:
        self.options = options
        self._question = _read_question(options.question, self.rates)
        if options.scorer_model is not None:
            self.needs = self.needs - {"base"}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        self._features = features
        self._pass = RatedTurns(
            self.options.scorer_model or features.base(),
            self._question,
            plain=self.options.question is not None,
            max_length=features.options.max_length,
        )
        self._known: dict[int, tuple[float, int]] = {}
        self._cut: set[int] = set()

    def turn_ratings(self, rows: NDArray[np.int64]) -> Floats:
        """float32 [m, 16]: the rating of each turn, 1 to 6; NaN past a row's last turn."""
        if not len(rows):
            return np.empty((0, MOST_TURNS), np.float32)
        arrays = self._features.compute(self._pass, rows)
        ratings = np.asarray(arrays["ratings"], np.float32)
        totals = np.nansum(ratings, axis=1).tolist()
        self._known.update(zip(rows.tolist(), zip(totals, arrays["turns"].tolist(), strict=True), strict=True))
        self._cut.update(rows[np.asarray(arrays["cut"], bool)].tolist())
        return ratings

    def score(self, rows: NDArray[np.int64]) -> Floats:
        return np.asarray(np.nansum(self.turn_ratings(rows), axis=1), np.float32)

    def explain(self, row: int) -> str:
        total, turns = self._known[row]
        return f"{self.rates} {total:.3f}" + (f" in {turns} turns" if turns > 1 else "")

    def log(self) -> Sequence[Mapping[str, Any]]:
        long = sum(turns > MOST_TURNS for _, turns in self._known.values())
        counts = {"rows": len(self._known), "texts cut": len(self._cut), f"more than {MOST_TURNS} turns": long}
        return [{"step": f"rated {self.rates}", "scorer": self._pass.model, **counts}]


def _read_question(file: str | None, rates: str) -> str:
    if file is None:
        return QUESTIONS[rates]
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the question cannot be read: {error}", where=file) from None
    if "{prompt}" not in text or (rates == "quality" and "{response}" not in text):
        lacking = "{prompt}" if "{prompt}" not in text else "{response}"
        raise BadInput(f"the question has no {lacking}, so it would rate every row alike", where=file)
    return text
