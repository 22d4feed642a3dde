"""A search over ordered lists of shots guided by a network that guesses a list's worth from its text (EASE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xpert.config import Config, option
from xpert.embedding import open_embedder
from xpert.errors import BadInput
from xpert.exemplars._searching import Ordered, Searched, SearchOptions, draw_lists
from xpert.exemplars._transport import set_distances
from xpert.few_shot import exemplar_text
from xpert.protocols import Embedder, Exemplars, ExemplarTask, Floats

if TYPE_CHECKING:
    from xpert.exemplars._neural_ucb import NeuralUcb

__all__ = ["PLUGIN"]


@dataclass(frozen=True)
class EaseOptions(SearchOptions):
    first: int = option(10, "of the rounds, how many first lists are drawn at random; published: 40 of 165", minimum=1)
    candidates: int = option(500, "lists drawn at random in each later round; published: batches of 2500", minimum=1)
    kept: int = option(
        50, "of these, how many the network sees: those nearest to the queries; published: 50 of a batch", minimum=1
    )
    embedder: str = option(
        "lm", "what turns the text of a whole list into a vector, its order included: lm, minilm, st:FOLDER or st:NAME"
    )
    hidden: int = option(100, "width of the network's layers", minimum=1)
    steps: int = option(1000, "training steps of the network in a round", minimum=1)
    rate: float = option(1e-3, "learning rate of the network", minimum=1e-6)
    regulariser: float = option(0.1, "lambda: weight decay times lists known, and the first value of U", minimum=1e-6)
    nu: float = option(0.01, "how much what is unknown is sought", minimum=0)


class Ease:
    """Each round draws lists, keeps those nearest to the queries, and scores the one a NeuralUCB thinks most of.

    A list is seen as the embedding of its whole text, so that order counts. Nearness is the optimal-transport distance
    (cost 1 - cosine) of the set of its exemplars to the queries with their answers. The network is trained anew each
    round on all lists scored; of the `kept` candidates the one with the greatest guess + bonus is scored next. Ties:
    the list drawn first. Score: the reward of the best list, which is too good for unseen queries by as much as the
    best of many tries is lucky.

    The released code repeats draw and choice over 20 batches of 2,500 candidates a round and, as shipped, takes the
    greatest guess without the bonus; here the bonus counts, as in the paper. Rewards that the network learns lie in
    [0, 1]: accuracy, or the geometric mean of an answer token's probability.
    """

    Options: ClassVar[type[Config]] = EaseOptions
    needs: ClassVar[frozenset[str]] = frozenset({"base", "queries", "score"})
    cost: ClassVar[str] = (
        "rounds passes of the base over count exemplars and all queries; a later round also embeds `kept` texts, which "
        "with embedder=lm costs as much again, and trains a small network, about a second"
    )
    source: ClassVar[str] = "Wu et al. 2024, Prompt Optimization with EASE?, arXiv:2405.16122"

    def __init__(self, options: EaseOptions) -> None:
        self.options = options

    def order(self, task: ExemplarTask, count: int, rng: np.random.Generator) -> list[Exemplars]:
        options = self.options
        space = _Space(task, count, options.embedder)
        with task.features.progress.task("scoring lists of exemplars", options.rounds) as progress:
            searched = Searched(task, options, progress)
            for rows in draw_lists(len(task.shots), count, min(options.first, options.rounds), rng, ()):
                searched.add(rows, "random")
                if searched.done:
                    return searched.result()
            vectors = space.embed(searched.lists)
            guide = self._network(vectors.shape[1], task.features.seed)
            while not searched.done:
                drawn = draw_lists(len(task.shots), count, options.candidates, rng, searched.lists)
                if not drawn:
                    break  # every list there is has been scored
                near = space.nearest(drawn, options.kept)
                added = self._round(guide, searched, near, vectors, space.embed(near))
                vectors = np.concatenate([vectors, added])
        return searched.result()

    def _network(self, inputs: int, seed: int) -> NeuralUcb:
        from xpert.exemplars._neural_ucb import NeuralUcb

        options = self.options
        return NeuralUcb(
            inputs,
            hidden=options.hidden,
            steps=options.steps,
            rate=options.rate,
            regulariser=options.regulariser,
            nu=options.nu,
            seed=seed,
        )

    def _round(
        self, guide: NeuralUcb, searched: Searched, lists: list[Ordered], known: Floats, candidates: Floats
    ) -> Floats:
        """Scores the most promising of the lists; gives its vector [1, d]."""
        import torch

        guide.fit(torch.from_numpy(known), torch.from_numpy(searched.unit_rewards()).float())
        guesses = guide.guess(torch.from_numpy(candidates))
        chosen = int(np.argmax((guesses.mean + guesses.bonus).numpy()))
        guide.chose(guesses.gradients[chosen])
        more = {"guess": float(guesses.mean[chosen]), "bonus": float(guesses.bonus[chosen])}
        searched.add(lists[chosen], "ease", more)
        return candidates[chosen : chosen + 1]


class _Space:
    """Lists as vectors, and how far their exemplars are from the queries."""

    def __init__(self, task: ExemplarTask, count: int, embedder: str) -> None:
        self.shots = task.shots.rows
        features = task.features
        self.embedder: Embedder = open_embedder(
            embedder, base=features.options.base, device=features.device, seed=features.seed
        )
        singles = [exemplar_text([row]) for row in self.shots]
        asked = [exemplar_text([row]) for row in task.queries]
        self.embedder.fit([*singles, *asked])
        self.singles = self.embedder.embed(singles)
        self.queries = self.embedder.embed(asked)
        longest = np.argsort([-len(text) for text in singles], kind="stable")[:count]
        self._check(tuple(int(row) for row in longest), embedder)

    def embed(self, lists: list[Ordered]) -> Floats:
        return self.embedder.embed([self._text(rows) for rows in lists])

    def nearest(self, lists: list[Ordered], kept: int) -> list[Ordered]:
        """The `kept` lists nearest to the queries, in the order drawn among equals."""
        distances = np.round(set_distances(self.singles, self.queries, lists), 9)
        return [lists[place] for place in np.argsort(distances, kind="stable")[:kept]]

    def _text(self, rows: Ordered) -> str:
        return exemplar_text([self.shots[row] for row in rows])

    def _check(self, rows: Ordered, name: str) -> None:
        """Refuses an embedder that does not read a list to its end, or does not see its order."""
        if len(rows) == 1:
            return
        texts = [self._text(rows), self._text(rows[:-1]), self._text(rows[::-1])]
        whole, shorter, turned = self.embedder.embed(texts)
        if texts[0] != texts[2] and np.allclose(whole, turned, atol=1e-6):
            raise BadInput(
                f"the embedder {name!r} gives a list and its reverse the same vector, so no order could be learnt",
                hint="use --param embedder=lm, minilm or st:NAME",
            )
        if np.allclose(whole, shorter, atol=1e-6):
            raise BadInput(
                f"the embedder {name!r} reads only the beginning of a list of {len(rows)} exemplars",
                hint="lower --count, or use an embedder that reads longer texts",
            )


PLUGIN = Ease
