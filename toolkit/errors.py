"""The errors a user can cause or meet.

    XpertError                      exit   HTTP
    ├── BadInput    wrong input       2     400
    │   ├── NotFound  no such thing   2     404
    │   └── Corrupt   damaged file    2     422
    └── Unavailable  not installed,   3     503
                     not reachable

`commands.main` turns them into one line and an exit status, the HTTP server into a JSON body. Every other
exception is a defect of xpert and keeps its traceback (exit status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = ["STOPPED", "BadInput", "Corrupt", "NotFound", "Unavailable", "XpertError", "nearest", "unknown"]

STOPPED = "stopped; what is finished is kept, and the same command goes on from there"


class XpertError(Exception):
    """An error with a sentence for the user: what is wrong, where, and how to mend it.

    `param` and `code` are what a server says besides: the request's parameter it is about, and a word for programs.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    param: str | None = None
    code: str | None = None

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if not self.hint:
            return text
        return f"{text.rstrip('.')}. {self.hint[:1].upper()}{self.hint[1:]}"


class BadInput(XpertError):
    """The user's input is wrong."""

    exit_code = 2
    http_status = 400


class NotFound(BadInput):
    """Something named by the user does not exist."""

    http_status = 404


class Corrupt(BadInput):
    """Stored data does not match its checksum or schema."""

    http_status = 422


class Unavailable(XpertError):
    """Something needed is not installed or not reachable; the hint says what to install."""

    exit_code = 3
    http_status = 503


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `name` was most likely meant to be, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> NotFound:
    """The error for a name that is not among `known`: it names the nearest match, or lists them all."""
    choices = sorted(known)
    close = nearest(name, choices)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(choices) or 'none'}"
    return NotFound(f"unknown {kind} {name!r}", where=where, hint=hint)
