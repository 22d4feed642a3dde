"""Limits of a key: what goes through in any stretch of time, what a refusal says, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.experts.server.failures import Busy
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.limits import MOST_KEPT, Admission, Bucket, KeyLimits, duration
from xpert.experts.server.schema import ParameterError


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """Limits under a clock that the test moves."""

    holder: KeyHolder
    clock: Clock
    limits: KeyLimits

    def admit(self, tokens: int = 0) -> Admission:
        return self.limits.admit(self.holder, tokens)

    def refused(self, tokens: int = 0) -> float:
        with pytest.raises(Busy) as refused:
            self.admit(tokens)
        assert refused.value.http_status == 429
        return refused.value.retry_after


def bench(**limits: int) -> Bench:
    clock = Clock()
    return Bench(KeyHolder("ada", "0" * 64, "", **limits), clock, KeyLimits(clock))


LIMITS = st.integers(1, 50)
# (seconds that pass, tokens of the estimate, share of it that is used, after how many later requests it ends)
REQUESTS = st.lists(
    st.tuples(st.floats(0, 90), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=40
)


def worst(times: list[float], amounts: list[float], rate: float) -> float:
    """The most by which any stretch of time that begins and ends with a request exceeds what comes in meanwhile."""
    return max(
        sum(amounts[i : j + 1]) - rate * (times[j] - times[i]) for i in range(len(times)) for j in range(i, len(times))
    )


@given(LIMITS, st.lists(st.floats(0, 5), min_size=1, max_size=120))
def test_no_stretch_of_time_sees_more_requests_than_allowed(limit: int, pauses: list[float]) -> None:
    it = bench(requests_per_minute=limit)
    times = []
    for pause in pauses:
        it.clock.now += pause
        try:
            it.admit().release()
            times.append(it.clock.now)
        except Busy:
            pass
    assert worst(times, [1.0] * len(times), limit / 60) <= limit + 1e-3


@given(st.integers(1, 10_000), REQUESTS)
def test_no_stretch_of_time_sees_more_tokens_than_allowed(limit: int, requests: list[tuple[float, ...]]) -> None:
    """Counted at the time of admission by what was used in the end, however long requests stay open meanwhile."""
    it = bench(tokens_per_minute=limit)
    times: list[float] = []
    used: list[float] = []
    open_: list[tuple[int, int, Admission]] = []
    for number, (pause, size, share, ends) in enumerate(requests):
        it.clock.now += pause
        for due, use, admission in [entry for entry in open_ if entry[0] <= number]:
            admission.release(use)
            open_.remove((due, use, admission))
        estimate = int(size * limit)
        try:
            admission = it.admit(estimate)
        except Busy:
            continue
        times.append(it.clock.now)
        used.append(int(share * estimate))
        open_.append((number + int(ends), int(share * estimate), admission))
    assert not times or worst(times, used, limit / 60) <= limit + 1e-2


def test_open_estimates_cannot_be_saved_up_for_a_burst() -> None:
    it = bench(tokens_per_minute=100)
    idle = it.admit(100)
    it.clock.now += 60
    it.admit(100).release(100)
    idle.release(0)  # by now the bucket would have been full anyway
    assert it.refused(100) == pytest.approx(60)


@given(LIMITS, REQUESTS)
def test_what_comes_back_is_never_more_than_if_the_use_had_been_known(
    limit: int, requests: list[tuple[float, ...]]
) -> None:
    """Against a plain bucket from which the use itself is taken at once; equal where requests follow each other."""
    for overlapping in (False, True):
        now, told = 0.0, Bucket(limit, 0.0)
        level, filled = float(limit), 0.0  # the plain one
        open_: list[tuple[int, float, float, int]] = []
        for number, (pause, size, share, ends) in enumerate(requests):
            now += pause
            for entry in [e for e in open_ if e[0] <= number or not overlapping]:
                told.settle(entry[3], entry[1], entry[2], now)
                open_.remove(entry)
            level, filled = min(float(limit), level + (now - filled) * limit / 60), now
            estimate = size * limit
            if told.wait(estimate, now):
                continue
            open_.append((number + int(ends), estimate, share * estimate, told.take(estimate, now)))
            level -= share * estimate
        for entry in open_:
            told.settle(entry[3], entry[1], entry[2], now)
        if overlapping:
            assert told.level <= level + 1e-6
        else:
            assert told.level == pytest.approx(level, abs=1e-6)


@given(LIMITS, st.integers(1, 10_000), st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), max_size=60))
def test_who_waits_as_told_is_let_in_and_not_before(
    requests: int, tokens: int, sent: list[tuple[float, float]]
) -> None:
    it = bench(requests_per_minute=requests, tokens_per_minute=tokens)
    for pause, size in sent:
        it.clock.now += pause
        try:
            it.admit(int(size * tokens)).release()
        except Busy as busy:
            before = it.clock.now
            if busy.retry_after > 0.1:
                it.clock.now = before + busy.retry_after - 0.05
                assert it.refused(int(size * tokens)) == pytest.approx(0.05, abs=1e-3)
            it.clock.now = before + busy.retry_after
            it.admit(int(size * tokens)).release()


@given(st.integers(1, 4), st.lists(st.booleans(), max_size=60))
def test_no_more_run_at_a_time_than_allowed(most: int, starts: list[bool]) -> None:
    it = bench(concurrent=most)
    running: list[Admission] = []
    for start in starts:
        if not start and running:
            running.pop(0).release()
        elif start and len(running) < most:
            running.append(it.admit())
        elif start:
            assert it.refused() == 1.0


def test_a_place_is_given_back_once_however_a_request_ends() -> None:
    it = bench(concurrent=1)
    with pytest.raises(ZeroDivisionError), it.admit():
        raise ZeroDivisionError
    with it.admit() as admission:
        admission.release()
        admission.release()
        it.admit().release()
    first = it.admit()
    first.release()
    second = it.admit()
    first.release()
    assert it.refused() == 1.0
    second.release()


def test_a_bucket_fills_evenly_and_not_beyond_its_brim() -> None:
    it = bench(requests_per_minute=60)
    for _ in range(60):
        it.admit().release()
    assert it.refused() == pytest.approx(1.0)
    it.clock.now += 1.0
    it.admit().release()
    it.clock.now += 1e6
    for _ in range(60):
        it.admit().release()
    it.refused()


def test_tokens_are_those_used_or_else_the_estimate() -> None:
    it = bench(tokens_per_minute=600)
    it.admit(400).release(100)
    assert it.limits.headers(it.holder)["x-ratelimit-remaining-tokens"] == "500"
    it.admit(400).release()
    assert it.limits.headers(it.holder)["x-ratelimit-remaining-tokens"] == "100"
    with it.admit(50) as admission:
        admission.used = 110  # more than was thought
    assert it.limits.headers(it.holder)["x-ratelimit-remaining-tokens"] == "0"
    assert it.refused(0) == pytest.approx(1.0)


def test_what_can_never_be_let_in_is_not_told_to_wait() -> None:
    it = bench(tokens_per_minute=100, requests_per_minute=1)
    with pytest.raises(ParameterError, match="come to 101 tokens, and the key's limit is 100 a minute") as refused:
        it.admit(101)
    assert refused.value.param == "max_tokens" and refused.value.http_status == 400
    it.admit(100).release()  # and it cost nothing


def test_a_refusal_takes_nothing() -> None:
    it = bench(tokens_per_minute=100, requests_per_minute=2, concurrent=1)
    running = it.admit(100)
    for _ in range(5):
        it.refused(50)
    assert it.limits.headers(it.holder)["x-ratelimit-remaining-requests"] == "1"
    running.release(0)
    it.admit(100).release()
    with pytest.raises(Busy) as refused:
        it.admit(100)
    assert "2 requests a minute and 100 tokens a minute is reached" in str(refused.value)


def test_the_headers() -> None:
    it = bench(requests_per_minute=60, tokens_per_minute=1000)
    with it.admit(500):
        assert it.limits.headers(it.holder) == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "1000",
            "x-ratelimit-remaining-tokens": "500",
            "x-ratelimit-reset-tokens": "30s",
        }
    assert bench(concurrent=1).limits.headers(it.holder.__class__("bob", "0" * 64, "")) == {}
    assert it.limits.headers(None) == {}
    it.limits.admit(None, 10**9).release()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.02, "20ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (3723.25, "1h2m3.25s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_changed_limit_counts_what_was_used() -> None:
    it = bench(requests_per_minute=10)
    for _ in range(8):
        it.admit().release()
    it.holder = replace(it.holder, requests_per_minute=12)
    for _ in range(4):
        it.admit().release()
    it.refused()
    it.holder = replace(it.holder, requests_per_minute=6)
    assert it.refused() == pytest.approx((12 - 6 + 1) * 10)
    it.holder = replace(it.holder, requests_per_minute=None)
    it.admit().release()


def test_holders_do_not_touch_each_other() -> None:
    it = bench(requests_per_minute=1)
    it.admit().release()
    it.refused()
    it.limits.admit(replace(it.holder, name="bob"), 0).release()


@settings(max_examples=5)
@given(st.integers(2, 4))
def test_memory_is_bounded_and_who_is_at_work_is_remembered(rounds: int) -> None:
    it = bench(requests_per_minute=1, concurrent=1)
    running = it.admit()
    for number in range(rounds * MOST_KEPT):
        it.clock.now += 61.0 / MOST_KEPT * 2
        it.limits.admit(replace(it.holder, name=f"k{number}"), 0).release()
    assert len(it.limits) <= MOST_KEPT
    it.refused()
    running.release()
    assert math.isinf(Bucket(5, 0.0).wait(6, 0.0))
