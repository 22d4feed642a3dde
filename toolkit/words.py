"""Texts as runs of hashed words, in numpy: what the search for near duplicates and overlaps works on.

A word is a run of letters, digits and underscores in lower case; a Chinese or Japanese character is a word by itself.
`words` is the plain definition, `hash_words` the fast form: the same words of a whole Arrow column, as 64-bit hashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["HashSet", "HashedWords", "grams", "hash_words", "words"]

Hashes = NDArray[np.uint64]

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")
# Byte by byte: capitals become small, ASCII that is no word becomes a space.
_ASCII = bytes(b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() or b == 95 else 32 for b in range(256))
_FIRST = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)  # masks of the first bytes
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FINAL = np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class HashedWords:
    """The words of n texts, end to end: `hashes` [w], and `offsets` [n+1] where each text begins."""

    hashes: Hashes
    offsets: NDArray[np.int64]

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        """[w] the text that each word belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int32), np.diff(self.offsets))


def hash_words(texts: pa.Array) -> HashedWords:
    """A large_string array without nulls -> its words."""
    import pyarrow.compute as pc

    plain = pc.string_is_ascii(texts)
    if not pc.all(plain).as_py():  # the rare text beyond ASCII is spelt out by the plain definition
        spelt = [" ".join(words(text)) for text in texts.filter(pc.invert(plain)).to_pylist()]
        texts = pc.replace_with_mask(texts, pc.invert(plain), pa.array(spelt, pa.large_string()))
    content, ends = _content(texts)
    data = np.frombuffer(content.translate(_ASCII) + b" " * 8, dtype=np.uint8)
    inside = data[: len(content) + 1] != 32
    edge = np.zeros(len(inside), dtype=bool)  # where a text begins, a word ends, though there be no space
    edge[ends] = True
    before = np.concatenate(([False], inside[:-1]))
    starts = np.flatnonzero(inside & (edge | ~before))
    lengths = np.flatnonzero(before & (edge | ~inside)) - starts
    return HashedWords(_hash_pieces(data, starts, lengths), np.searchsorted(starts, ends))


def _content(texts: pa.Array) -> tuple[bytes, NDArray[np.int64]]:
    """All texts end to end, and [n+1] where each begins."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return (bytes(memoryview(data)[ends[0] : ends[-1]]) if data is not None else b""), ends - ends[0]


def _hash_pieces(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Hashes:
    """64-bit hashes of pieces of `data`, which goes on for eight bytes after the last: eight bytes a step."""
    eights = np.ndarray(shape=(len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))  # one at every byte
    value = lengths.astype(np.uint64)
    left = np.arange(len(starts))
    for step in range(0, int(lengths.max(initial=0)), 8):
        if step:
            left = left[lengths[left] > step]
        piece = eights[starts[left] + step] & _FIRST[np.minimum(lengths[left] - step, 8)]
        mixed = (value[left] ^ piece) * _MULTIPLIER
        value[left] = mixed ^ (mixed >> np.uint64(32))
    return value * _FINAL


def grams(source: HashedWords, size: int) -> tuple[Hashes, NDArray[np.int64]]:
    """All runs of `size` words inside one text: their hashes [g], and the position [g] of each one's first word."""
    count = len(source.hashes) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    value = source.hashes[:count].copy()
    for step in range(1, size):
        value *= _MULTIPLIER
        value += source.hashes[step : step + count]
    value ^= value >> np.uint64(29)
    value *= _FINAL
    value ^= value >> np.uint64(32)
    inside = np.flatnonzero(source.rows[:count] == source.rows[size - 1 :])
    return value[inside], inside


class HashSet:
    """A fixed set of hashes: one look into a bit table settles nearly all that are not in it, a search the rest."""

    BITS = 22

    def __init__(self, members: Hashes) -> None:
        self.members = np.unique(members)
        self._table = np.zeros(1 << self.BITS, dtype=bool)
        self._table[self.members >> np.uint64(64 - self.BITS)] = True

    def __len__(self) -> int:
        return len(self.members)

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        """hashes [g] -> bool [g]."""
        found: NDArray[np.bool_] = np.zeros(len(hashes), dtype=bool)
        if len(self.members):
            likely = np.flatnonzero(self._table[hashes >> np.uint64(64 - self.BITS)])
            at = np.minimum(np.searchsorted(self.members, hashes[likely]), len(self.members) - 1)
            found[likely] = self.members[at] == hashes[likely]
        return found
