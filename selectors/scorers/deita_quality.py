"""How good a row's answer is, rated from 1 to 6 by a language model."""

from __future__ import annotations

from typing import ClassVar

from xpert.selectors.scorers._turn_ratings import TurnRatings

__all__ = ["PLUGIN"]


class DeitaQuality(TurnRatings):
    """The model is asked how good the answer to the request is; the rating is sum over k = 1..6 of k * p(k).

    p is the softmax over the six numbers' logits alone. Score: the sum over the row's turns (the first 16). Any
    language model can be the scorer; one that was not trained for it, and a small one above all, rates poorly. Texts
    are cut to --max-length tokens by rule and counted in the log. A model whose tokenizer does not write the numbers
    as one token each is refused.
    """

    rates: ClassVar[str] = "quality"


PLUGIN = DeitaQuality
