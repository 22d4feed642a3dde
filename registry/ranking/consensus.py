"""Kemeny's order: the one that contradicts the fewest pairwise preferences of the tasks.

Systems that all the others of a group beat by majority stand before that group in every such order (the extended
Condorcet criterion), so the order falls apart into components that are solved apart: exactly up to sixteen systems, and
beyond by moves from several starts, with a lower bound that says how far from the best the outcome can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.registry.ranking.moves import search
from xpert.registry.ranking.points import Scores, as_array, borda
from xpert.registry.ranking.subsets import MOST_EXACT, best_order

__all__ = ["MOST_EXACT", "Consensus", "best_of", "disagreement", "kemeny", "preferences"]

KICKS = 20


@dataclass(frozen=True)
class Consensus:
    """Kemeny's order, best first, and what is known of it.

    `disagreement` counts the contradicted preferences; no order has fewer than `bound`; `certified`: they are equal,
    so the order is one of the best. `components`: the groups that majorities put in this order whatever stands inside.
    """

    order: tuple[str, ...]
    disagreement: int
    bound: int
    components: tuple[tuple[str, ...], ...]

    @property
    def certified(self) -> bool:
        return self.disagreement == self.bound


def kemeny(scores: Scores, *, seed: int = 0, kicks: int = KICKS) -> Consensus:
    """The order of least disagreement; ties and missing scores prefer neither.

    Exact where no component has more than 16 systems that majorities run through in circles; of several best orders it
    is then the first by the alphabet, if that also holds of the groups that ties join. Elsewhere it is what moves find
    from Borda's order and others, never worse than Borda's. Raises BadInput for a score that is not a number.
    Time O(tasks n^2 + n^3), and O(2^k k) for a component of k. Source: Kemeny 1959; Davenport and Kalagnanam 2004.
    """
    systems, array = as_array(scores)
    if not systems:
        return Consensus((), 0, 0, ())
    prefer = preferences(array)
    place = {system: number for number, system in enumerate(systems)}
    start = np.array([place[system] for system in borda(scores)])
    order, components = best_of(prefer, start, seed=seed, kicks=kicks)
    return Consensus(
        tuple(systems[number] for number in order),
        _contradicted(prefer, order),
        _bound(prefer, components),
        tuple(tuple(systems[number] for number in component) for component in components),
    )


def disagreement(order: Sequence[str], scores: Scores) -> int:
    """How many pairwise preferences of the tasks an order contradicts: the sum of Kendall distances."""
    systems, array = as_array(scores)
    place = {system: number for number, system in enumerate(systems)}
    return _contradicted(preferences(array), [place[system] for system in order if system in place])


def preferences(array: NDArray[np.float64]) -> NDArray[np.int64]:
    """scores [tasks, n] -> [n, n]: the number of tasks in which a scores above b."""
    found = np.zeros((array.shape[1],) * 2, dtype=np.int64)
    for task in array:
        found += task[:, None] > task[None, :]
    return found


def best_of(
    prefer: NDArray[np.int64], start: NDArray[np.int64], *, seed: int, kicks: int, blocks: bool = True
) -> tuple[list[int], list[list[int]]]:
    """(the order, its components), no worse than the order `start`.

    `kicks` and `blocks` are those of `moves.search`, which orders the components of more than sixteen.
    """
    gain = prefer - prefer.T
    components: list[list[int]] = []
    for group in _components(gain >= 0):
        parts = [group]
        if len(group) > MOST_EXACT:  # ties alone may hold a large group together; without them it may fall apart
            inner = _components(gain[np.ix_(group, group)] > 0)
            parts = [[group[number] for number in part] for part in inner]
        for part in parts:
            within = prefer[np.ix_(part, part)]
            if len(part) <= MOST_EXACT:
                found = best_order(within)
            else:
                found = search(within - within.T, _starts(within, part, start), kicks=kicks, seed=seed, blocks=blocks)
            components.append([part[number] for number in found])
    return [system for component in components for system in component], components


def _starts(within: NDArray[np.int64], part: Sequence[int], start: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Orders of one component to begin with: as `start` has it, by all margins, and by how many are beaten."""
    place = np.empty(len(start), dtype=np.int64)
    place[start] = np.arange(len(start))
    gain = within - within.T
    return [
        np.argsort(place[part], kind="stable"),
        np.argsort(-gain.sum(axis=1), kind="stable"),
        np.argsort(-np.sign(gain).sum(axis=1), kind="stable"),
    ]


def _bound(prefer: NDArray[np.int64], components: Sequence[Sequence[int]]) -> int:
    """What no order's disagreement is below: the minority of each pair, and what circles cost inside the components."""
    bound = int(np.minimum(prefer, prefer.T).sum()) // 2
    for component in components:
        within = prefer[np.ix_(component, component)]
        gain = within - within.T
        if len(component) <= MOST_EXACT:  # solved exactly, so what it exceeds the minorities by is needed
            bound += int(np.triu(np.maximum(-gain, 0), 1).sum())
        else:
            bound += _circles(gain)
    return bound


def _components(edges: NDArray[np.bool_]) -> list[list[int]]:
    """Strongly connected components of a graph [n, n], each sorted, in an order that no edge runs against."""
    n = len(edges)
    reach = edges | np.eye(n, dtype=bool)
    for _ in range(max(1, n.bit_length())):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    # Who reaches a system reaches all that it reaches, so the numbers of those reached sort the components.
    reached = reach.sum(axis=1)
    mutual = reach & reach.T
    first = mutual.argmax(axis=1)
    order = sorted(range(n), key=lambda a: (-reached[a], first[a], a))
    components: list[list[int]] = []
    for system in order:
        if components and first[components[-1][0]] == first[system]:
            components[-1].append(system)
        else:
            components.append([system])
    return components


def _circles(gain: NDArray[np.int64]) -> int:
    """A lower bound on what any order contradicts of the majorities, by margins: triangles of majorities that share no
    part of a margin, each of which must be cut once. Greedy; time O(n^3)."""
    margin = np.maximum(gain, 0)
    bound = 0
    for a, b in np.argwhere(margin > 0):
        while margin[a, b] > 0:
            closing = np.minimum(margin[b], margin[:, a])
            c = int(closing.argmax())
            cut = min(margin[a, b], closing[c])
            if cut <= 0:
                break
            for one, other in ((a, b), (b, c), (c, a)):
                margin[one, other] -= cut
            bound += int(cut)
    return bound


def _contradicted(prefer: NDArray[np.int64], order: Sequence[int]) -> int:
    return int(np.tril(prefer[np.ix_(order, order)], -1).sum())
