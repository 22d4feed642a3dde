"""Texts as runs of hashed words, in numpy: what the search for near duplicates and overlaps works on.

A word is a run of letters, digits and underscores in lower case; a Chinese or Japanese character is a word by itself.
`words` is the plain definition, `hash_words` the fast form: the same words of a whole Arrow column, as 64-bit hashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["HashSet", "HashedWords", "grams", "hash_words", "words"]

Hashes = NDArray[np.uint64]

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")
# For ASCII texts, byte by byte: capitals become small, what is no word becomes a space.
_ASCII = bytes(ord(chr(b).lower()) if b < 128 and (chr(b).isalnum() or b == 95) else 32 for b in range(256))
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


class _Vocabulary(dict[str, int]):
    """word -> 64-bit hash, remembered; emptied when it has grown large, since hashes can be made again."""

    LIMIT = 400_000

    def __missing__(self, word: str) -> int:
        if len(self) >= self.LIMIT:
            self.clear()
        value = self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


_vocabulary = _Vocabulary()


def hash_words(texts: pa.Array) -> HashedWords:
    """A large_string array without nulls -> its words. About 0.1 microseconds a word."""
    plain = pc.string_is_ascii(texts)
    if not pc.all(plain).as_py():
        spelt = [" ".join(words(text)) for text in texts.filter(pc.invert(plain)).to_pylist()]
        texts = pc.replace_with_mask(texts, pc.invert(plain), pa.array(spelt, pa.large_string()))
        texts = pc.if_else(plain, _ascii_words(texts), texts)
    else:
        texts = _ascii_words(texts)
    lists = pc.ascii_split_whitespace(texts)
    encoded = lists.flatten().dictionary_encode()
    known = encoded.dictionary.to_pylist()
    table = np.fromiter((_vocabulary[word] for word in known), dtype=np.uint64, count=len(known))
    codes = encoded.indices.to_numpy()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    if "" in known:  # splitting leaves an empty word at the edges of a text
        full = codes != known.index("")
        offsets = np.concatenate(([0], np.cumsum(full)))[offsets]
        codes = codes[full]
    return HashedWords(table[codes] if len(table) else np.empty(0, np.uint64), offsets)


def _ascii_words(texts: pa.Array) -> pa.Array:
    """Maps the bytes of all texts at once. Bytes beyond ASCII become spaces: the caller replaces such texts."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = bytes(memoryview(data)[ends[0] : ends[-1]]).translate(_ASCII) if data is not None else b""
    buffers = [None, pa.py_buffer((ends - ends[0]).tobytes()), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_string(), len(texts), buffers)


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
