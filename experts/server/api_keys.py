"""Who may ask: the key of a request against the digests of a file that may change while the server runs."""

from __future__ import annotations

import hmac
import logging
import os
import threading
from pathlib import Path
from typing import Self

from xpert.errors import XpertError
from xpert.experts.server.failures import Denied
from xpert.experts.server.key_file import KeyHolder, digest, read_keys

__all__ = ["ApiKeys", "bearer"]

log = logging.getLogger("xpert.server")

_State = tuple[int, int, int] | None
"""Time of change in ns, size and inode of a file; None where it cannot be looked at."""


class ApiKeys:
    """The keys of a file, read again when it changes. May be asked by several threads.

    A changed file that cannot be read leaves the keys as they were, and the log says so: a slip of the editor locks
    nobody out. Cost of a check: one `stat`, one sha256, and one comparison a key.
    """

    def __init__(self, path: Path, holders: tuple[KeyHolder, ...], state: _State) -> None:
        self.path = path
        self._holders = holders
        self._state = state
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises NotFound or Corrupt: a server does not start with keys that it cannot read."""
        state = _state(path)
        found = cls(path, read_keys(path), state)
        _advise(path)
        if not found.holders:
            log.warning("%s holds no keys: every request will be refused", path)
        return found

    @property
    def holders(self) -> tuple[KeyHolder, ...]:
        """Those of the file as last read."""
        return self._holders

    def check(self, presented: str | None) -> KeyHolder:
        """The holder of a key. Raises Denied where none, or an unknown one, is presented.

        The digest is compared with every key's, each in constant time and without an end at the first that fits: how
        long it takes says neither how much of a key was right nor which one it was.
        """
        self._look_again()
        if not presented:
            raise Denied("no API key was given", hint="send `Authorization: Bearer xp-...`")
        asked = digest(presented)
        found: KeyHolder | None = None
        for holder in self._holders:
            if hmac.compare_digest(holder.sha256, asked):
                found = holder
        if found is None:
            raise Denied("the API key is not known here")
        return found

    def _look_again(self) -> None:
        state = _state(self.path)
        if state == self._state:
            return
        with self._lock:
            if state == self._state:
                return
            self._state = state  # whatever comes of it: a broken file is complained of once
            try:
                self._holders = read_keys(self.path)
            except (XpertError, OSError) as error:
                log.error("the API keys stay as they were, since their file cannot be read anew: %s", error)
                return
            log.info("read %d API keys anew", len(self._holders))
            _advise(self.path)


def bearer(authorization: str | None) -> str | None:
    """The key in the value of an `Authorization` header; None where it is of another scheme or empty."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _state(path: Path) -> _State:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _advise(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read or written by others: run chmod 600 %s", path, path)
