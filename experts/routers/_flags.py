"""Wishes about cost that a prompt carries, such as `[Flag: smallest model]`. Source: Tryage, arXiv:2308.11601."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FLAGS", "Wishes", "read_flags"]

FLAGS: Mapping[str, Mapping[str, float]] = {
    "smallest model": {"size": 1.0},
    "small model": {"size": 0.2},
    "fastest model": {"seconds": 1.0},
    "fast model": {"seconds": 0.2},
    "best model": {"size": 0.0, "seconds": 0.0},
}
"""flag -> the weights that it sets in place of the router's options."""

_FLAG = re.compile(r"\[\s*flag\s*:\s*([^\[\]]*?)\s*\]", re.IGNORECASE)


@dataclass(frozen=True)
class Wishes:
    """A prompt without its known flags, the weights these set, and the flags, known and unknown, as they came."""

    prompt: str
    weights: Mapping[str, float] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def read_flags(prompt: str) -> Wishes:
    """A later flag overrides an earlier one. Case and spaces make no difference."""
    weights: dict[str, float] = {}
    known: list[str] = []
    unknown: list[str] = []

    def read(match: re.Match[str]) -> str:
        flag = " ".join(match[1].lower().split())
        if flag not in FLAGS:
            unknown.append(flag)
            return match[0]
        weights.update(FLAGS[flag])
        known.append(flag)
        return ""

    rest = _FLAG.sub(read, prompt)
    return Wishes(rest.strip() if known else prompt, weights, tuple(known), tuple(unknown))
