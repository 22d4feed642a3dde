"""Finished parts of a long run, one JSON line each, so that the same run goes on where it was stopped.

The first line holds the key of the run: a hash of all that shapes its result. Each line is on disk before the next
part begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

__all__ = ["append_line", "read_journal"]


def append_line(journal: TextIO, value: Mapping[str, Any]) -> None:
    """Writes one part, and returns once it is on disk."""
    journal.write(json.dumps(value, ensure_ascii=False) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def read_journal(path: Path, key: str) -> list[dict[str, Any]]:
    """The parts that an interrupted run of the same key has finished; none where the file is another run's.

    A line cut by a crash, and what follows it, is taken away from the file, so that one may append to it.
    """
    if not path.is_file():
        return []
    done: list[dict[str, Any]] = []
    whole = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (json.JSONDecodeError, UnicodeDecodeError):
                value = None
            if value is None:
                break
            if number == 0 and value.get("key") != key:
                return []
            if number:
                done.append(value)
            whole += len(line)
    os.truncate(path, whole)
    return done
