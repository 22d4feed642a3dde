"""Progress through one tiny interface: silent in the library, a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from xpert.printable import printable

__all__ = ["SILENT", "Progress", "Silent", "StreamProgress", "Task", "duration"]


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """`steps` more of the total are done; `note` is shown beside the rate."""


class Progress(Protocol):
    """Where long work says how far it is."""

    def task(self, title: str, total: float | None = None) -> AbstractContextManager[Task]: ...

    def say(self, message: str) -> None: ...


class _NoTask:
    def advance(self, steps: float = 1, note: str = "") -> None:
        pass


class Silent:
    """Says nothing; the default everywhere in the library."""

    @contextmanager
    def task(self, title: str, total: float | None = None) -> Iterator[Task]:
        yield _NoTask()

    def say(self, message: str) -> None:
        pass


SILENT: Progress = Silent()


class StreamProgress:
    """A bar with rate and remaining time where `stream` is a terminal; else a line every `every` seconds."""

    def __init__(self, stream: TextIO | None = None, *, every: float = 10.0) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.terminal = self.stream.isatty()
        self.every = 0.2 if self.terminal else every

    @contextmanager
    def task(self, title: str, total: float | None = None) -> Iterator[Task]:
        task = _StreamTask(self, title, total)
        try:
            yield task
        except BaseException:
            task.close(finished=False)
            raise
        task.close(finished=True)

    def say(self, message: str) -> None:
        print(printable(message, keep="\n\t"), file=self.stream, flush=True)


class _StreamTask:
    def __init__(self, owner: StreamProgress, title: str, total: float | None) -> None:
        self.owner, self.title, self.total = owner, title, total
        self.done, self.note = 0.0, ""
        self.start = self.shown = time.monotonic()

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or self.note
        now = time.monotonic()
        if now - self.shown >= self.owner.every:
            self.shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        spent = max(now - self.start, 1e-9)
        rate = self.done / spent
        parts = [f"{self.title}: {self.done:,.0f}"]
        if self.total:
            parts[0] += f" of {self.total:,.0f}"
        parts.append(f"{rate:,.1f}/s")
        if self.total and rate > 0:
            parts.append(f"{duration(max(0.0, self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        line = printable("  ".join(parts))
        if not self.owner.terminal:
            print(line, file=self.owner.stream, flush=True)
            return
        if self.total:
            filled = round(20 * min(1.0, self.done / self.total))
            line = f"[{'#' * filled}{'.' * (20 - filled)}] {line}"
        print(f"\r\x1b[2K{line[:160]}", end="", file=self.owner.stream, flush=True)

    def close(self, *, finished: bool) -> None:
        if self.owner.terminal:
            print("\r\x1b[2K", end="", file=self.owner.stream)
        spent = duration(time.monotonic() - self.start)
        ending = f"done in {spent}" if finished else f"stopped after {spent}"
        note = f"  {self.note}" if self.note else ""
        line = printable(f"{self.title}: {self.done:,.0f} {ending}{note}")
        print(line, file=self.owner.stream, flush=True)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`; under ten seconds with one decimal."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
