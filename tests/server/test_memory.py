"""Memory that is free goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import sys

import pytest

from xpert.experts.server.memory import keep_trimmed, trim


def test_trimming_asks_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        def malloc_trim(self, pad: int) -> int:
            asked.append(pad)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert trim() is True
    assert asked == [0]


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_a_library_that_cannot_is_no_error(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fails(name: object) -> object:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", fails)
    assert trim() is False


@pytest.mark.skipif(sys.platform != "linux", reason="the real call is glibc's")
def test_the_real_call_does_no_harm() -> None:
    assert trim() in (True, False)


def test_it_goes_on_until_it_is_cancelled() -> None:
    times: list[int] = []

    async def run() -> None:
        task = asyncio.create_task(keep_trimmed(0.001, lambda: bool(times.append(1))))
        while len(times) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
