"""Tokens -> text as it comes: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["ReplyText"]

_INCOMPLETE = "\ufffd"


class ReplyText:
    """The text of one reply, token by token.

    The pieces joined are `tokenizer.decode` of all tokens (special tokens left out), cut before the first stop string.
    A character whose last bytes never come is left out at the end.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens are decoded with a few emitted ones before them, since some tokenizers drop a leading space.
        self._context = 0
        self._emitted = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said after one more token; `stopped` tells that a stop string was reached."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._fresh())

    def finish(self) -> str:
        """What was held back in case a stop string or a character went on."""
        if self.stopped:
            return ""
        text = self._release(self._fresh(whole=True))
        rest, self._held = text + self._held, ""
        return rest

    def _fresh(self, *, whole: bool = False) -> str:
        before = self._decode(self._ids[self._context : self._emitted])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_INCOMPLETE) and not whole:
            return ""
        text = now[len(before) :]
        if text or whole:
            self._context, self._emitted = self._emitted, len(self._ids)
        return text.rstrip(_INCOMPLETE) if whole else text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _release(self, fresh: str) -> str:
        if not fresh:
            return ""
        text = self._held + fresh
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
