"""Checks a safetensors file by its header alone: no tensor is read, nothing heavy is imported."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpert.errors import Corrupt

__all__ = ["TensorEntry", "read_tensor_header", "read_tensor_spans", "tensor_header"]

_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its type as safetensors writes it (`F32`, `BF16`, ...), its shape, and its [start, end) in bytes from
    where the tensors begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


def read_tensor_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name.

    Raises Corrupt unless the header is whole and the tensors fill the rest of the file without gap or overlap, as the
    format demands (https://github.com/huggingface/safetensors#format). Reads the header alone, at most 100 MB.
    """
    return _read(path)[1]


def read_tensor_spans(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Where the tensors begin in the file, and the [start, end) of each from there, in order. Errors as above."""
    begin, tensors = _read(path)
    return begin, sorted((entry.start, entry.end) for entry in tensors.values())


def _read(path: Path) -> tuple[int, dict[str, TensorEntry]]:
    with path.open("rb") as stream:
        return tensor_header(stream, os.fstat(stream.fileno()).st_size, where=str(path))


def tensor_header(stream: Readable, size: int, *, where: str) -> tuple[int, dict[str, TensorEntry]]:
    """Where the tensors begin, and the tensors by name, of an open file of `size` bytes. Errors as above."""
    try:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError("its header's length is impossible")
        raw = stream.read(length)
        if not raw.startswith(b"{"):
            raise ValueError("its header is not JSON")
        header = json.loads(raw, object_pairs_hook=_without_repeats)
        return 8 + length, _tensors(header, size - 8 - length)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise Corrupt(f"not a sound safetensors file: {error}", where=where) from None


def _tensors(header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError("its metadata is not a mapping of texts")
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{name!r} has the unknown type {dtype!r}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has no sound shape and offsets")
        start, end = offsets
        if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name!r} does not hold as many bytes as its shape says")
        found[name] = TensorEntry(dtype, tuple(shape), start, end)
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = end
    if position != data_bytes:
        raise ValueError(f"it holds {data_bytes:,} bytes of tensors where its header says {position:,}")
    return found


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found
