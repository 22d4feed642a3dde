"""A rating by criteria that language models mine from some thirty preferred pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.criteria import MiningOptions, majority, mine
from xpert.errors import BadInput
from xpert.preferences import Pair, draw_pairs, read_pairs
from xpert.protocols import Floats
from xpert.records import Shots
from xpert.selectors.scorers._preference_fit import FEWEST_PAIRS, PreferenceFit, RatingOptions, judge_for, side_texts

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["PLUGIN"]

_FEWEST_PREFERRED = 10


@dataclass(frozen=True)
class CritiQOptions(RatingOptions):
    pairs: str | None = option(
        None, 'about 30 preferred pairs, JSON lines {"a": row id or text, "b": ..., "preferred": "a" or "b"}'
    )
    manager: str | None = option(
        None, "the model that writes criteria: local:MODEL, or an endpoint, http://HOST:PORT/v1#MODEL"
    )
    workers: str | None = option(None, "the model that judges pairs; the manager where none is named")
    criteria: int = option(6, "how many criteria are tried at once", minimum=1)
    rounds: int = option(3, "how often all are tried and revised", minimum=1)
    keep: float = option(0.75, "agreement with the pairs from which a criterion counts", minimum=0, maximum=1)
    ban: float = option(0.5, "agreement up to which one is banned and replaced", minimum=0, maximum=1)
    critiques: int = option(
        4, "of how many of its wrong pairs a criterion is criticised before it is rewritten", minimum=0
    )
    labelled: int = option(300, "how many pairs of the pool are labelled by majority", minimum=FEWEST_PAIRS)
    votes: int = option(1, "how often a worker is asked each question; above 1 at temperature 1", minimum=1)
    excerpt: int = option(1000, "how many characters of a prompt and of an answer a model is shown", minimum=20)
    reply_tokens: int = option(16, "the longest reply of a worker; one that thinks first needs more", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ban >= self.keep:
            raise BadInput(f"ban={self.ban:g} is not below keep={self.keep:g}")


class CritiQ:
    """Criteria are mined from preferred pairs, then label pairs of the pool, from which a rating is learned.

    A manager writes criteria as sentences beside some that are built in; a worker judges every preferred pair under
    each, in both orders, with A, B or no opinion. Its agreement = right / decided answers: from `keep` a criterion
    stays, up to `ban` it is replaced, between its wrong pairs are criticised and it is rewritten; the best version of
    each is kept. After the rounds the criteria from `keep` on vote on pairs drawn from the pool, and a Bradley-Terry
    model, linear in the vectors, learns from the majorities. Score: its rating; the zero means nothing. The log holds
    all criteria with their agreement, and the held-out accuracy. Agreement is measured on the very pairs that the
    criteria were rewritten for, so it flatters: with 30 pairs, 0.75 is within reach of luck.
    """

    Options: ClassVar[type[Config]] = CritiQOptions
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings", "judge"})
    cost: ClassVar[str] = (
        "2 * votes * criteria * (rounds * pairs + labelled) questions to the worker, kept; few to the manager"
    )
    source: ClassVar[str] = "Guo et al. 2025, arXiv:2502.19279"

    def __init__(self, options: CritiQOptions) -> None:
        self.options = options
        for name in ("pairs", "manager"):
            if getattr(options, name) is None:
                hint = "give pairs=FILE and manager=MODEL"
                raise BadInput(f"method 'critiq' needs {name}", hint=hint)
        self._log: list[Mapping[str, Any]] = []
        self._known: dict[int, float] = {}

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        options = self.options
        assert options.pairs is not None
        assert options.manager is not None
        if options.on == "base":
            features.base()
        reach: dict[str, Any] = {"concurrency": options.concurrency, "timeout": options.timeout}
        pairs = [pair for pair in read_pairs(options.pairs, features.pool.ids()) if pair.p != 0.5]
        if len(pairs) < _FEWEST_PREFERRED:
            raise BadInput(
                f"{len(pairs)} preferred pairs are too few to find criteria by; the least is {_FEWEST_PREFERRED}",
                where=options.pairs,
            )
        manager = judge_for(features, options.manager, **reach)
        same = options.workers in (None, options.manager)
        workers = manager if same or options.workers is None else judge_for(features, options.workers, **reach)
        texts = side_texts(features, [(pair.a, pair.b) for pair in pairs], options.excerpt)
        kept, log = mine(texts, [pair.p > 0.5 for pair in pairs], manager, workers, self._mining(), rng)
        drawn = draw_pairs(len(features.pool), options.labelled, rng)
        labels = majority(
            workers,
            [one.criterion for one in kept],
            side_texts(features, drawn, options.excerpt),
            options.votes,
            options.reply_tokens,
        )
        labelled = [Pair(a, b, float(p)) for (a, b), p in zip(drawn, labels, strict=True) if np.isfinite(p)]
        names = [{"criterion": one.criterion.name, "accuracy": round(one.accuracy, 3)} for one in kept]
        self._fit = PreferenceFit(features, labelled, options.on, rng)
        self._log = [
            *log,
            *({"step": "kept", **name} for name in names),
            {"step": "labelled", "pairs": len(drawn), "with a majority": len(labelled)},
            self._fit.log(),
        ]

    def score(self, rows: NDArray[np.int64]) -> Floats:
        scores = self._fit.score(rows)
        self._known.update(zip(rows.tolist(), scores.tolist(), strict=True))
        return scores

    def explain(self, row: int) -> str:
        return f"rating {self._known[row]:+.4g}"

    def log(self) -> Sequence[Mapping[str, Any]]:
        return self._log

    def _mining(self) -> MiningOptions:
        options = self.options
        return MiningOptions(
            criteria=options.criteria,
            rounds=options.rounds,
            keep=options.keep,
            ban=options.ban,
            critiques=options.critiques,
            votes=options.votes,
            reply_tokens=options.reply_tokens,
        )


PLUGIN = CritiQ
