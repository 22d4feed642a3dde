"""A rating learned from pairwise judgements: of a file, or of a language model asked which of two rows is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.preferences import Pair, ask_votes, draw_pairs, read_pairs
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._preference_fit import FEWEST_PAIRS, PreferenceFit, RatingOptions, judge_for, side_texts

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["CRITERIA", "PLUGIN", "QuRating", "QuRatingOptions"]

CRITERIA = {
    "educational": "has more educational value: a student would learn more from it, and it explains things well",
    "expertise": "takes more expert knowledge to understand and to write",
    "facts": "holds more facts, above all precise and little-known ones",
    "style": "is better written: clear, polished and pleasant to read",
}
_TEMPLATE = (
    "Below are two texts, A and B. Which of the two {criterion}? Judge by this alone; neither length nor order matters."
    "\n\nText A:\n{a}\n\nText B:\n{b}\n\nReply with one letter, A or B, and nothing else."
)


@dataclass(frozen=True)
class QuRatingOptions(RatingOptions):
    pairs: str | None = option(
        None, 'judgements in a file, JSON lines {"a": row id or text, "b": ..., "p": share of votes for a}'
    )
    judge: str | None = option(
        None, "or who judges pairs drawn from the pool: a model (local:MODEL) or an endpoint, http://HOST:PORT/v1#MODEL"
    )
    criterion: str = option(
        "educational", "what the judge compares; of pairs in a file it is the name", choices=tuple(CRITERIA)
    )
    judged: int = option(500, "how many pairs the judge is given, each in both orders", minimum=1)
    votes: int = option(1, "how often the judge is asked each question; above 1 at temperature 1", minimum=1)
    conf: float = option(
        0.5, "pairs whose share p of votes is within conf/2 of one half are left out", minimum=0, maximum=1
    )
    excerpt: int = option(2000, "how many characters of a prompt and of an answer the judge is shown", minimum=20)
    reply_tokens: int = option(16, "the longest reply of the judge; one that thinks first needs more", minimum=1)


class QuRating:
    """s = w . x such that sigmoid(s_a - s_b) is the share p of votes for row a against row b.

    A Bradley-Terry model, linear in the vectors x [n, d] (convex: one solution, no seed), with a ridge chosen by
    cross-validation. Pairs with |p - 1/2| < conf/2 are left out; at least 20 must be left. A judge is asked both orders
    of a pair, so that a liking for the first place cancels; its replies are kept, and a stopped run goes on. Score: s;
    its zero means nothing. The log tells how many held-out pairs a fit without them orders as voted: read it before you
    trust the ratings. `xpert select --method qurating` draws by the ratings (see `--kind selector`).
    """

    Options: ClassVar[type[Config]] = QuRatingOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    cost: ClassVar[str] = "2 * judged * votes questions to the judge, kept; then one product with the embeddings"
    source: ClassVar[str] = "Wettig et al. 2024, arXiv:2402.09739"

    def __init__(self, options: QuRatingOptions) -> None:
        self.options = options
        if (options.pairs is None) == (options.judge is None):
            said = "needs pairs to learn from" if options.pairs is None else "takes pairs or a judge, not both"
            raise BadInput(f"method 'qurating' {said}", hint="give pairs=FILE, or judge=MODEL")
        self._log: list[Mapping[str, Any]] = []
        self._known: dict[int, float] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options = self.options
        if options.on == "base":
            features.base()
        self._log = []
        pairs = read_pairs(options.pairs, features.pool.ids()) if options.pairs else self._judged(features, rng)
        kept = [pair for pair in pairs if abs(pair.p - 0.5) >= options.conf / 2]
        self._log.append({"step": "pairs", "given": len(pairs), "confident": len(kept)})
        self._fit = PreferenceFit(features, kept, options.on, rng)
        self._log.append(self._fit.log())

    def score(self, rows: NDArray[np.int64]) -> Floats:
        scores = self._fit.score(rows)
        self._known.update(zip(rows.tolist(), scores.tolist(), strict=True))
        return scores

    def explain(self, row: int) -> str:
        return f"{self.options.criterion} {self._known[row]:+.4g}"

    def log(self) -> Sequence[Mapping[str, Any]]:
        return self._log

    def _judged(self, features: Features, rng: np.random.Generator) -> list[Pair]:
        options = self.options
        assert options.judge is not None
        judge = judge_for(features, options.judge, concurrency=options.concurrency, timeout=options.timeout)
        drawn = draw_pairs(len(features.pool), options.judged, rng)
        template = _TEMPLATE.replace("{criterion}", CRITERIA[options.criterion])
        votes = ask_votes(
            judge,
            template,
            side_texts(features, drawn, options.excerpt),
            votes=options.votes,
            max_tokens=options.reply_tokens,
        )
        questions = votes.first_shown + votes.second_shown + votes.unreadable
        counts = {"questions": questions, "unreadable": votes.unreadable}
        places = {"first shown preferred": votes.first_shown, "second": votes.second_shown}
        self._log.append({"step": "judge", "judge": judge.answerer.identity, **counts, **places})
        shares = votes.share
        decided = int((np.abs(shares - 0.5) >= options.conf / 2).sum())
        if decided < min(FEWEST_PAIRS, len(drawn)):
            raise BadInput(
                f"the judge decides {decided} of {len(drawn)} pairs alike in both orders, too few to learn from: of "
                f"{questions:,} replies {votes.first_shown:,} prefer what is shown first, {votes.second_shown:,} what "
                f"is shown second, {votes.unreadable:,} cannot be read",
                where=judge.answerer.identity,
                hint="take a judge that looks at the texts, or raise judged",
            )
        return [Pair(a, b, float(p)) for (a, b), p in zip(drawn, shares, strict=True) if np.isfinite(p)]


PLUGIN = QuRating
