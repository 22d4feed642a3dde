"""Gives memory that the allocator keeps for itself back to the system.

Caches of keys and values come and go in sizes that seldom fit what was freed before, on several threads. glibc keeps
what is freed for reuse, so that a server's resident memory creeps up for hours though nothing is held any more.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from contextlib import suppress

__all__ = ["TRIM_SECONDS", "keep_trimmed", "trim"]

TRIM_SECONDS = 20.0
"""Seconds between two trims. One takes some milliseconds, on a thread of its own."""


def trim() -> bool:
    """Asks the C library to give free pages back; False where it cannot (musl, macOS, Windows) or had none."""
    with suppress(OSError, AttributeError, TypeError):
        return bool(ctypes.CDLL(None).malloc_trim(0))
    return False


async def keep_trimmed(seconds: float = TRIM_SECONDS, work: Callable[[], bool] = trim) -> None:
    """Trims every so often, until it is cancelled."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(work)
