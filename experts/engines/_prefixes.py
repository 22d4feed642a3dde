"""Prompt prefixes that several requests share: their keys and values, computed once.

A prefix is kept under what decides its keys and values: its tokens, and the row's experts by content, weights, gate
and bias (`RowMixture.identity`), so that an expert exchanged under its old name never meets the old one's prefixes.
Prefixes are told apart in blocks of tokens. Only one that was seen twice is kept: most prompts share nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from xpert.experts.engines._kv_cache import RowCache

__all__ = ["BLOCK", "Chain", "PrefixStore"]

BLOCK = 16
"""Tokens per block: shared beginnings shorter than this are computed anew."""
SIGHTINGS = 65_536
"""Blocks whose number of sightings is remembered."""

Chain = tuple[int, ...]
"""One hash per whole block of a prompt, each of the blocks up to it and of the row's identity."""


@dataclass(frozen=True)
class _Entry:
    identity: Hashable
    tokens: tuple[int, ...]
    chain: Chain
    cache: RowCache
    bytes: int


class PrefixStore:
    """Keys and values of shared prefixes within `limit` bytes, those used longest ago leaving first. 0 keeps none.

    `hits` counts the requests that began with a kept prefix, `spared` the tokens in them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = 0
        self.spared = 0
        self.bytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by the hash of all their blocks
        self._index: dict[int, int] = {}  # hash of some first blocks -> entry that holds them
        self._sightings: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def chain(self, identity: Hashable, prompt: Sequence[int]) -> Chain:
        """The prompt's blocks, without its last token, whose logits must be computed in any case."""
        if not self.limit:
            return ()
        found, hashed = [], hash(identity)
        for end in range(BLOCK, len(prompt), BLOCK):
            hashed = hash((hashed, *prompt[end - BLOCK : end]))
            found.append(hashed)
        return tuple(found)

    def sight(self, chain: Chain) -> None:
        """A request with these blocks has come."""
        with self._lock:
            for block in chain:
                self._sightings[block] = self._sightings.pop(block, 0) + 1
            while len(self._sightings) > SIGHTINGS:
                self._sightings.popitem(last=False)

    def shared(self, chain: Chain) -> int:
        """Tokens of the longest prefix that was seen more than once."""
        with self._lock:
            count = next((n for n in range(len(chain), 0, -1) if self._sightings.get(chain[n - 1], 0) > 1), 0)
        return count * BLOCK

    def find(self, identity: Hashable, prompt: Sequence[int], chain: Chain) -> RowCache | None:
        """The cache that holds the longest kept prefix of the prompt, cut to it."""
        with self._lock:
            found = self._longest(identity, prompt, chain)
            if found is None:
                return None
            key, count = found
            self._entries.move_to_end(key)
            entry = self._entries[key]
            return entry.cache if len(entry.tokens) == count else entry.cache.head(count)

    def known(self, identity: Hashable, prompt: Sequence[int], chain: Chain) -> int:
        """How many tokens `find` would give."""
        with self._lock:
            found = self._longest(identity, prompt, chain)
            return found[1] if found else 0

    def _longest(self, identity: Hashable, prompt: Sequence[int], chain: Chain) -> tuple[int, int] | None:
        """(entry, tokens) of the longest kept prefix."""
        for blocks in range(len(chain), 0, -1):
            key = self._index.get(chain[blocks - 1])
            entry = self._entries.get(key) if key is not None else None
            count = blocks * BLOCK
            # Hashes may collide: what counts is the tokens.
            if entry is not None and entry.identity == identity and entry.tokens[:count] == tuple(prompt[:count]):
                assert key is not None
                return key, count
        return None

    def put(self, identity: Hashable, prompt: Sequence[int], chain: Chain, cache: RowCache) -> None:
        """Keeps a cache of one row that holds the first `cache.width` tokens of the prompt, a multiple of `BLOCK`."""
        blocks = cache.width // BLOCK
        size = cache.bytes
        if not blocks or size > self.limit:
            return
        key = chain[blocks - 1]
        with self._lock:
            if key in self._entries:
                return
            entry = _Entry(identity, tuple(prompt[: blocks * BLOCK]), chain[:blocks], cache, size)
            self._entries[key] = entry
            self.bytes += size
            self._index.update(dict.fromkeys(entry.chain, key))
            while self.bytes > self.limit:
                self._drop(next(iter(self._entries)))

    def used(self, tokens: int) -> None:
        """Counts a request that was spared `tokens` tokens."""
        with self._lock:
            self.hits += 1
            self.spared += tokens

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.bytes
        for block in entry.chain:
            if self._index.get(block) == key:
                del self._index[block]
        # Blocks that other kept prefixes begin with as well are found there from now on.
        for other, kept in self._entries.items():
            for block in set(kept.chain) & set(entry.chain):
                self._index[block] = other
