"""Seeded sketches of long vectors that arrive block by block: inner products survive, the whole vector is never held.

Both kinds multiply every coordinate by a random sign and add the coordinates of each of q buckets, q being the largest
prime that is at most the sketch's dims. E<Sx, Sy> = <x, y>; for unit vectors the variance is at most about 2 / q.
Imports torch; itself imported only once a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from xpert.errors import unknown

__all__ = ["KINDS", "Sketch"]

KINDS = ("fold", "countsketch")


class Sketch:
    """Sketches of vectors that consist of named blocks.

    `sizes`: block name -> its length, in the order in which the blocks lie in the whole vector. `fold`: coordinate i
    goes to bucket i mod q. The modulus is prime because layers are as wide as powers of two: modulo 8,192 the same
    input of a layer would meet itself in every second row of every factor. `countsketch`: the coordinates of a block
    are permuted first, so that buckets are random, and as even as they can be. Signs and permutations follow from the
    seed and a block's name alone.

    Cost: one multiplication and one addition per coordinate (`countsketch`: and one gather); memory one byte
    (nine) per coordinate of the whole vector.
    Source: Charikar, Chen & Farach-Colton 2002, doi:10.1007/3-540-45465-9_59; Weinberger et al. 2009, arXiv:0902.2206.
    """

    def __init__(
        self, sizes: Mapping[str, int], dims: int, *, kind: str = "fold", seed: int = 0, device: str = "cpu"
    ) -> None:
        if kind not in KINDS:
            raise unknown("sketch", kind, KINDS)
        self.dims = dims
        self.buckets = _largest_prime(dims)
        self._offsets: dict[str, int] = {}
        self._signs: dict[str, Tensor] = {}
        self._orders: dict[str, Tensor] = {}
        offset = 0
        for name, size in sizes.items():
            # Always drawn on the CPU: other devices have generators of their own.
            generator = torch.Generator().manual_seed(_seed_of(seed, name))
            self._offsets[name] = offset
            self._signs[name] = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            if kind == "countsketch":
                self._orders[name] = torch.randperm(size, generator=generator).to(device)
            self._signs[name] = self._signs[name].to(device)
            offset += size

    def empty(self, rows: int) -> Tensor:
        """float32 [rows, dims] zeros, to be added to."""
        return torch.zeros(rows, self.dims, dtype=torch.float32, device=next(iter(self._signs.values())).device)

    def add(self, out: Tensor, name: str, block: Tensor) -> None:
        """Adds the sketch of a block [b, size] float32 to `out` [b, dims]."""
        if name in self._orders:
            block = block.index_select(1, self._orders[name])
        signed = block * self._signs[name]
        size, q = signed.shape[1], self.buckets
        start = self._offsets[name] % q
        # What fills up the turn begun, then whole turns, then the rest.
        head = min(q - start, size)
        out[:, start : start + head] += signed[:, :head]
        whole = head + (size - head) // q * q
        if whole > head:
            out[:, :q] += signed[:, head:whole].reshape(len(signed), -1, q).sum(1)
        if size > whole:
            out[:, : size - whole] += signed[:, whole:]


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _largest_prime(limit: int) -> int:
    """The largest prime that is at most `limit`; 1 below 2."""
    for number in range(limit, 1, -1):
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            return number
    return 1
