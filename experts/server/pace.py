"""Tokens a second, of late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["Pace"]

WINDOW = 5
"""Seconds that the pace is the mean of."""


class Pace:
    """Counts tokens by the second; `total` since the start. O(1) a count, and memory for WINDOW seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW + 1)

    def add(self, tokens: int) -> None:
        self.total += tokens
        now = int(self._clock())
        if self._seconds and self._seconds[-1][0] == now:
            self._seconds[-1] = now, self._seconds[-1][1] + tokens
        else:
            self._seconds.append((now, tokens))

    def per_second(self) -> float:
        """The mean over the last WINDOW whole seconds."""
        now = int(self._clock())
        return sum(tokens for second, tokens in self._seconds if now - WINDOW <= second < now) / WINDOW
