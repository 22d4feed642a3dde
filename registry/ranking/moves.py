"""Better orders by moves: one system, or a block of neighbours, to another place.

Orders are arrays of system numbers, best first. `gain` [n, n] is antisymmetric: by how much more a is preferred to b
than b to a, which is what putting a before b spares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BY_BLOCKS", "descend", "search"]

MOST_BY_BLOCKS = 300

Order = NDArray[np.int64]


def search(gain: NDArray[np.int64], starts: list[Order], *, kicks: int, seed: int, blocks: bool = True) -> list[int]:
    """The best order that is found from the starts, and from `kicks` shuffles of short stretches of the best one.

    Never worse than any of the starts. Time O(n^2) a sweep, O(n^3) for each move of a block; these are left out
    beyond 300 systems, and without `blocks`.
    """
    rng = np.random.default_rng(seed)
    blocks = blocks and len(gain) <= MOST_BY_BLOCKS
    found = [descend(gain, start, blocks=blocks) for start in starts]
    best = max(found, key=lambda order: _spared(gain, order))
    most = _spared(gain, best)
    for _ in range(kicks):
        tried = descend(gain, _kicked(best, rng), blocks=blocks)
        spared = _spared(gain, tried)
        if spared >= most:
            best, most = tried, spared
    order: list[int] = best.tolist()
    return order


def descend(gain: NDArray[np.int64], order: Order, *, blocks: bool = True) -> Order:
    """Moves single systems to their best places while that helps, then blocks of neighbours, until neither does."""
    order = order.copy()
    while True:
        while _sweep(gain, order):
            pass
        moved = _move_block(gain, order) if blocks else None
        if moved is None:
            return order
        order = moved


def _spared(gain: NDArray[np.int64], order: Order) -> int:
    return int(np.triu(gain[np.ix_(order, order)], 1).sum())


def _kicked(order: Order, rng: np.random.Generator) -> Order:
    n = len(order)
    length = min(n, max(3, n // 5))
    start = int(rng.integers(n - length + 1))
    kicked = order.copy()
    rng.shuffle(kicked[start : start + length])
    return kicked


def _sweep(gain: NDArray[np.int64], order: Order) -> bool:
    """Tries every system once, in place; says whether one moved."""
    better = False
    for system in order.copy():
        place = int(np.flatnonzero(order == system)[0])
        passed = gain[system, order]
        up = np.cumsum(passed[:place][::-1])  # up[k]: what moving up by k + 1 places spares
        down = np.cumsum(-passed[place + 1 :])
        most_up, most_down = int(up.max(initial=0)), int(down.max(initial=0))
        if max(most_up, most_down) <= 0:
            continue
        better = True
        if most_up >= most_down:
            target = place - 1 - int(up.argmax())
            order[target + 1 : place + 1] = order[target:place].copy()
        else:
            target = place + 1 + int(down.argmax())
            order[place:target] = order[place + 1 : target + 1].copy()
        order[target] = system
    return better


def _move_block(gain: NDArray[np.int64], order: Order) -> Order | None:
    """The order after the one move of a block of two or more that spares most; None where none spares anything."""
    n = len(order)
    ordered = gain[np.ix_(order, order)]
    sums = np.zeros((n + 1, n), dtype=np.int64)
    np.cumsum(ordered, axis=0, out=sums[1:])
    best, move = 0, (0, 0, 0)
    for length in range(2, n // 2 + 1):
        # Two blocks that are neighbours change places, so it is enough to move the shorter one, up or down.
        block = sums[length:] - sums[:-length]  # [i, k]: gain of the systems i .. i+length-1 over the one at k
        starts = np.arange(n - length + 1)[:, None]
        places = np.arange(n)[None, :]
        up = np.where(places < starts, block, 0)[:, ::-1].cumsum(axis=1)[:, ::-1]  # [i, k]: moved up to k
        down = np.where(places >= starts + length, -block, 0).cumsum(axis=1)  # [i, k]: moved down behind k
        for spared, downwards in ((up, False), (down, True)):
            where = int(spared.argmax())
            if spared.flat[where] > best:
                best = int(spared.flat[where])
                start, target = divmod(where, n)
                move = (start, start + length, target + 1) if downwards else (target, start, start + length)
    if best <= 0:
        return None
    low, middle, high = move
    return np.concatenate([order[:low], order[middle:high], order[low:middle], order[high:]])
