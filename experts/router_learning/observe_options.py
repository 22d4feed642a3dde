"""How a mixture's experts are observed: the options of `xpert router observe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xpert.config import option
from xpert.experts.evaluate import EvalOptions

__all__ = ["ObserveOptions"]


@dataclass(frozen=True)
class ObserveOptions(EvalOptions):
    """As a suite is run for scores, and what of it becomes the score."""

    metric: str = option(
        "generation",
        "what is scored: the generated answer, or, of items with choices, the likeliest choice",
        choices=("generation", "likelihood"),
    )

    def shaping(self) -> dict[str, Any]:
        """The options that shape the result, which is all but how many answers are generated at once."""
        return {name: value for name, value in self.to_dict().items() if name != "max_batch"}
