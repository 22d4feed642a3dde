"""Text from others on its way to a terminal: what would steer the terminal is shown, not obeyed."""

from __future__ import annotations

import re

__all__ = ["printable"]

# Control characters (C0, delete, C1, where ESC and CSI are), line separators, changes of direction, and half pairs,
# which no stream can encode.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with every steering character written as in JSON (`\u001b`), save those of `keep`."""
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)
