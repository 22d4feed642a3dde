"""What a key's holder may use: requests and tokens a minute, and requests at a time.

Requests and tokens are token buckets: a bucket holds a minute's worth, so that a quiet holder may use it at once, and
fills evenly. In any stretch of w seconds at most the minute's worth and w/60 of it again goes through.

What a request will use is known only when it has ended, so it is admitted on an estimate, which is taken out of the
bucket, and the rest comes back at the end. Not all of it does where the bucket has filled up meanwhile: had only what
was used been taken at the start, the bucket would have stood full for a while, and what a full bucket is offered is
lost. Without that, a holder could keep estimates open to save up for a burst beyond the limit. So each open request has
a part that may come back, and the bucket never holds more than its capacity less all those parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from xpert.experts.server.failures import Busy
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.schema import ParameterError

__all__ = ["Admission", "Bucket", "KeyLimits", "duration"]

MOST_KEPT = 1024
"""Holders whose use is remembered before those who are at rest are forgotten."""
_SLACK = 1e-4  # of a request or token: rounding must not turn away who waited exactly as long as told


class Bucket:
    """A token bucket of `per_minute` units, full at first. `now` in seconds, never earlier than it was before."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = float(per_minute)
        self.level = self.capacity
        self._now = now
        self._open: dict[int, float] = {}  # admission -> what may still come back of it; the oldest first
        self._held = 0.0
        self._next = 0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken, 0 if it can be now; infinite where it is more than the bucket holds."""
        if amount > self.capacity:
            return math.inf
        self._fill(now)
        missing = amount - self.level
        return missing * 60 / self.capacity if missing > _SLACK else 0.0

    def full_in(self, now: float) -> float:
        """Seconds until the bucket is full, if nothing more is taken or comes back."""
        self._fill(now)
        return (self.capacity - self.level) * 60 / self.capacity

    def take(self, amount: float, now: float) -> int:
        """Takes what `wait` said can be taken; the number names it to `settle`. Time O(1)."""
        self._fill(now)
        self.level -= amount
        number, self._next = self._next, self._next + 1
        self._open[number] = amount
        self._held += amount
        return number

    def settle(self, number: int, estimate: float, used: float, now: float) -> None:
        """Ends what was taken: the unused part comes back, as far as it still may; use beyond the estimate is taken,
        and the level may fall below nothing by it."""
        self._fill(now)
        returnable = self._open.pop(number, 0.0)
        self._held = self._held - returnable if self._open else 0.0  # no rounding is carried on
        self.level += min(estimate - used, returnable)

    def resize(self, per_minute: int, now: float) -> None:
        """A new limit; what has been used of the old one counts against it."""
        self._fill(now)
        self.level += per_minute - self.capacity
        self.capacity = float(per_minute)
        self._shrink()

    @property
    def at_rest(self) -> bool:
        """Whether a new bucket would be no different."""
        return not self._open and self.level >= self.capacity

    def _fill(self, now: float) -> None:
        if now <= self._now:
            return
        self.level = min(self.capacity, self.level + (now - self._now) * self.capacity / 60)
        self._now = now
        self._shrink()

    def _shrink(self) -> None:
        """Gives up what can no longer come back, the oldest admission's first. Time O(1) amortised."""
        excess = self.level + self._held - self.capacity
        while excess > 0 and self._open:
            number = next(iter(self._open))
            given_up = min(excess, self._open[number])
            self._held -= given_up
            if given_up < self._open[number]:
                self._open[number] -= given_up
                return
            del self._open[number]
            excess -= given_up


class _Use:
    """What one holder has used."""

    def __init__(self, holder: KeyHolder, now: float) -> None:
        self.requests = Bucket(holder.requests_per_minute, now) if holder.requests_per_minute else None
        self.tokens = Bucket(holder.tokens_per_minute, now) if holder.tokens_per_minute else None
        self.running = 0

    def follow(self, holder: KeyHolder, now: float) -> None:
        """The limits may have changed with the file of keys."""
        self.requests = _resized(self.requests, holder.requests_per_minute, now)
        self.tokens = _resized(self.tokens, holder.tokens_per_minute, now)

    def at_rest(self, now: float) -> bool:
        full = all(b is None or (b.full_in(now) <= 0 and b.at_rest) for b in (self.requests, self.tokens))
        return full and not self.running


@dataclass
class Admission:
    """A request that was let in. Ends once, by `release` or at the end of a `with` block.

    `used` is what it came to in tokens; while it is None, the estimate stands: who forgets to say pays in full.
    """

    used: int | None
    _release: Callable[[int | None], None] | None

    def release(self, used: int | None = None) -> None:
        """Ends the request; later calls change nothing."""
        release, self._release = self._release, None
        if used is not None:
            self.used = used
        if release is not None:
            release(self.used)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class KeyLimits:
    """The use of all holders, by name. Belongs to one thread, the event loop's; nothing here waits.

    Memory is bounded: beyond MOST_KEPT holders, those whose buckets are full and who run nothing are forgotten, which
    changes nothing for them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}
        self._sweep_at = MOST_KEPT

    def admit(self, holder: KeyHolder | None, tokens: int) -> Admission:
        """Lets a request in that will use about `tokens`, its prompt and the most it may answer.

        Without a holder there is no limit. Raises Busy, with the seconds after which the same request will be let in if
        no other comes before it; where only a place among the concurrent ones is missing, nobody knows when one ends,
        and it says 1. Raises ParameterError for a request that is larger than a minute's tokens: it would never be let
        in. Nothing is taken by a request that is refused.
        """
        if holder is None:
            return Admission(None, None)
        now = self._clock()
        use = self._use(holder, now)
        if use.tokens is not None and tokens > use.tokens.capacity:
            raise ParameterError(
                f"the prompt and max_tokens come to {tokens:,} tokens, and the key's limit is "
                f"{use.tokens.capacity:,.0f} a minute",
                "max_tokens",
                hint="lower max_tokens, or shorten the prompt",
            )
        for_request = use.requests.wait(1, now) if use.requests else 0.0
        for_tokens = use.tokens.wait(tokens, now) if use.tokens else 0.0
        for_place = 1.0 if holder.concurrent is not None and use.running >= holder.concurrent else 0.0
        wait = max(for_request, for_tokens, for_place)
        if wait > 0:
            limits = [
                (for_request, f"{holder.requests_per_minute} requests a minute"),
                (for_tokens, f"{holder.tokens_per_minute} tokens a minute"),
                (for_place, f"{holder.concurrent} requests at a time"),
            ]
            reached = " and ".join(text for seconds, text in limits if seconds)
            raise Busy(
                f"the key's limit of {reached} is reached", retry_after=wait, hint=f"try again in {duration(wait)}"
            )
        return self._let_in(use, tokens, now)

    def headers(self, holder: KeyHolder | None) -> dict[str, str]:
        """OpenAI's headers, for whatever is limited: how many are allowed, how many are left (rounded down), and when
        all are back."""
        if holder is None:
            return {}
        now = self._clock()
        use = self._use(holder, now)
        found = {}
        for what, bucket in (("requests", use.requests), ("tokens", use.tokens)):
            if bucket is not None:
                reset = bucket.full_in(now)
                found[f"x-ratelimit-limit-{what}"] = f"{bucket.capacity:.0f}"
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level + _SLACK)))
                found[f"x-ratelimit-reset-{what}"] = duration(reset)
        return found

    def __len__(self) -> int:
        """Holders whose use is remembered."""
        return len(self._uses)

    def _let_in(self, use: _Use, tokens: int, now: float) -> Admission:
        if use.requests is not None:
            use.requests.settle(use.requests.take(1, now), 1, 1, now)  # a request counts, whatever comes of it
        bucket = use.tokens
        number = bucket.take(tokens, now) if bucket is not None else 0
        use.running += 1

        def release(used: int | None) -> None:
            use.running -= 1
            if bucket is not None:
                bucket.settle(number, tokens, tokens if used is None else used, self._clock())

        return Admission(None, release)

    def _use(self, holder: KeyHolder, now: float) -> _Use:
        use = self._uses.get(holder.name)
        if use is None:
            if len(self._uses) >= self._sweep_at:
                self._uses = {name: kept for name, kept in self._uses.items() if not kept.at_rest(now)}
                self._sweep_at = max(MOST_KEPT, 2 * len(self._uses))  # so that sweeping is rare whoever remains
            use = self._uses[holder.name] = _Use(holder, now)
        use.follow(holder, now)
        return use


def duration(seconds: float) -> str:
    """As OpenAI's headers write it: `1h2m3s`, `1.5s`, `20ms`; rounded up, so that to wait as long is enough."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + text


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    if bucket.capacity != per_minute:
        bucket.resize(per_minute, now)
    return bucket
