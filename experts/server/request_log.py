"""The server's request log: what was asked, how it was routed and what came of it, as JSON lines.

`RequestLog.record` hands a record to a thread of its own and returns at once: a slow disk never holds up a reply. What
does not fit the queue is dropped, counted, and said in the server's log.

    FOLDER/requests-2026-11-30-4711-9f3ac2d1.jsonl      date (UTC), process, and a number of its own
    FOLDER/requests-2026-11-30-4711-9f3ac2d1-2.jsonl    the same day's second file, once the first is full

Several processes may write into one folder, from several machines: each writes files that are its own alone. Files have
mode 0600 and the folder, where it is made here, 0700. A record holds neither headers nor keys, only a key's name.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from xpert.errors import BadInput
from xpert.protocols import Candidate, Route, WeightedExperts
from xpert.records import Message
from xpert.source_files import encode
from xpert.storage import disk_errors

__all__ = ["SCHEMA", "RequestLog", "RequestRecord"]

log = logging.getLogger("xpert.server")

SCHEMA = 1
CANDIDATES = 10
"""Candidates of a route that are kept, best first."""
MAX_BYTES = 256 << 20
QUEUED_RECORDS = 10_000
QUEUED_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class RequestRecord:
    """One request. `time`: when it came, in seconds since 1970; `seconds`: from then to the end of its reply.

    mixture, fingerprint: which mixture served then, in which state. model: what the request asked for. routed: whether
    the router chose, as it does where `model` is the mixture. experts: those of a second stage, where that answered.
    fell_back: whether the router left it to the base model. finished: "stop" or "length" where the reply is whole, else
    in a word what ended it ("cancelled", "error", "timeout"). reply: None where replies are not kept. key: the name of
    the client's key, never the key.
    """

    id: str
    time: float
    mixture: str
    fingerprint: str
    model: str
    messages: tuple[Message, ...]
    experts: WeightedExperts = ()
    candidates: tuple[Candidate, ...] = ()
    chance: float | None = None
    reason: str = ""
    routed: bool = True
    fell_back: bool = False
    finished: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    reply: str | None = None
    key: str | None = None

    def taking(self, route: Route) -> Self:
        """The record with what the route says. The base answers by the router's choice where it was `routed` there."""
        return dataclasses.replace(
            self,
            experts=route.experts,
            candidates=route.candidates[:CANDIDATES],
            chance=route.chance,
            reason=route.reason,
            fell_back=self.routed and not route.experts,
        )

    @property
    def score(self) -> float | None:
        """Of the best candidate; None where the router tells none."""
        return max((candidate.score for candidate in self.candidates), default=None)

    @property
    def characters(self) -> int:
        """Of prompt and reply."""
        return sum(len(message.content) for message in self.messages) + len(self.reply or "")

    def to_dict(self) -> dict[str, Any]:
        """As a line of the log says it; optional parts that are None are left out."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "id": self.id,
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "mixture": self.mixture,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
            "experts": [{"expert": key, "weight": round(weight, 6)} for key, weight in self.experts],
            "candidates": [{"expert": one.expert, "score": round(one.score, 6)} for one in self.candidates],
            "reason": self.reason,
            "routed": self.routed,
            "fell_back": self.fell_back,
            "finished": self.finished,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 4),
        }
        optional = {"chance": self.chance, "reply": self.reply, "key": self.key}
        return value | {name: part for name, part in optional.items() if part is not None}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError for what is no record of this schema or an earlier one."""
        if not isinstance(value, Mapping) or not 1 <= value["schema"] <= SCHEMA:
            raise ValueError("not a record of a schema that is known here")
        chance = value.get("chance")
        return cls(
            id=_text(value["id"]),
            time=datetime.fromisoformat(value["time"]).timestamp(),
            mixture=_text(value["mixture"]),
            fingerprint=_text(value["fingerprint"]),
            model=_text(value["model"]),
            messages=tuple(Message(_text(one["role"]), _text(one["content"])) for one in value["messages"]),
            experts=tuple((_text(one["expert"]), float(one["weight"])) for one in value["experts"]),
            candidates=tuple(Candidate(_text(one["expert"]), float(one["score"])) for one in value["candidates"]),
            chance=None if chance is None else float(chance),
            reason=_text(value["reason"]),
            routed=bool(value["routed"]),
            fell_back=bool(value["fell_back"]),
            finished=_text(value["finished"]),
            prompt_tokens=int(value["prompt_tokens"]),
            completion_tokens=int(value["completion_tokens"]),
            seconds=float(value["seconds"]),
            reply=_text_or_none(value.get("reply")),
            key=_text_or_none(value.get("key")),
        )


class RequestLog:
    """Writes records of one process into `folder`; replies only where asked for.

    A file is followed by a new one when the day ends or it holds `max_bytes`. Queue: at most `queued` records, and 64
    million characters of them. Raises BadInput where the folder cannot be written. Close it: what is queued is written
    then.
    """

    def __init__(
        self,
        folder: str | Path,
        replies: bool = False,
        *,
        max_bytes: int = MAX_BYTES,
        queued: int = QUEUED_RECORDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self.replies = replies
        self.dropped = 0
        """Records that are not in the log, for want of room in the queue or on the disk."""
        self._queued = queued
        self._waiting: collections.deque[RequestRecord] = collections.deque()
        self._characters = 0
        self._changed = threading.Condition()
        self._closed = False
        self._files = _Files(_writable(self.folder), max_bytes, clock)
        self._thread = threading.Thread(target=self._run, name="xpert-request-log", daemon=True)
        self._thread.start()

    def record(self, record: RequestRecord) -> bool:
        """Queues a record, from any thread; False where it was dropped. Never waits for the disk."""
        if not self.replies and record.reply is not None:
            record = dataclasses.replace(record, reply=None)
        with self._changed:
            full = len(self._waiting) >= self._queued or self._characters > QUEUED_CHARACTERS
            if not full and not self._closed:
                self._waiting.append(record)
                self._characters += record.characters
                self._changed.notify()
                return True
        self._drop("is closed" if self._closed else "cannot keep up")
        return False

    def close(self, timeout: float = 30.0) -> None:
        """Writes what is queued, for at most `timeout` seconds, and ends the thread. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("the request log in %s was not written to its end within %g s", self.folder, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                batch, self._waiting = list(self._waiting), collections.deque()
                self._characters = 0
                ending = self._closed
            for record in batch:
                try:
                    self._files.write(encode(record.to_dict()) + b"\n")
                except Exception as error:  # whatever is wrong with one record or the disk must not end the log
                    self._drop(f"cannot be written ({error!r})")
            if ending:
                self._end()
                return

    def _end(self) -> None:
        try:
            self._files.close()
        except OSError as error:
            log.error("the end of the request log in %s may not be on the disk: %s", self.folder, error)
        if self.dropped:
            log.warning("the request log in %s lacks %d records", self.folder, self.dropped)

    def _drop(self, why: str) -> None:
        """Counts a lost record, and says so whenever their number has doubled."""
        with self._changed:
            self.dropped += 1
            count = self.dropped
        if count & (count - 1) == 0:
            log.warning("the request log in %s %s: %d records are lost by now", self.folder, why, count)


class _Files:
    """The files of one process, one after another. Used by one thread."""

    def __init__(self, folder: Path, max_bytes: int, clock: Callable[[], float]) -> None:
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._descriptor: int | None = None
        self._day, self._part, self._bytes = "", 0, 0

    def write(self, line: bytes) -> None:
        """A whole line, or none where the disk fails."""
        day = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d")
        full = self._bytes and self._bytes + len(line) > self._max_bytes
        if self._descriptor is None or day != self._day or full:
            self._open(day)
        assert self._descriptor is not None
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, self._bytes)  # what came of the line goes; the next one begins there
            raise
        self._bytes += len(line)

    def _open(self, day: str) -> None:
        self.close()
        self._part = self._part + 1 if day == self._day else 1
        self._day = day
        part = f"-{self._part}" if self._part > 1 else ""
        path = self._folder / f"requests-{day}-{self._own}{part}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
                self._descriptor, self._bytes = None, 0


def _writable(folder: Path) -> Path:
    """Makes the folder where there is none, and says so where others may read one that was there."""
    with disk_errors(folder):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        elif not folder.is_dir():
            raise BadInput("is a file; the request log is a folder", where=str(folder), hint="give another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput("may not be written", where=str(folder), hint="choose another place for the request log")
    if folder.stat().st_mode & 0o077:
        log.warning("others may look into the folder of the request log, %s: chmod 700 it", folder)
    return folder


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)
