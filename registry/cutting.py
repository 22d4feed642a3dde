"""Cutting files into blobs: safetensors at the borders of their larger tensors, so that equal tensors are kept once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from xpert.errors import BadInput
from xpert.registry.blobs import open_plain
from xpert.registry.tensor_header import read_tensor_spans
from xpert.registry.versions import Part, StoredFile

__all__ = ["LEAST_PART", "describe_file"]

LEAST_PART = 64 << 10
"""Bytes: smaller tensors stay together with their neighbours, since a thousand small blobs cost more than they save."""
_MOST_PARTS = 4_096
_CHUNK = 1 << 20


def describe_file(path: Path, name: str) -> StoredFile:
    """A file as a record holds it. Reads it once; what a file is cut into depends on its content alone.

    Raises Corrupt for a `.safetensors` file that is none, BadInput where the file changes while it is read.
    """
    size = path.stat().st_size
    lengths = _lengths(path, size) if path.suffix == ".safetensors" else [size]
    whole = hashlib.sha256()
    parts = []
    with open_plain(path) as stream:
        for length in lengths:
            digest = hashlib.sha256()
            left = length
            while left:
                chunk = _read(stream, min(left, _CHUNK), path)
                digest.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            parts.append(Part(digest.hexdigest(), length))
        if stream.read(1):
            raise BadInput("changed while it was read", where=str(path), hint="publish it again")
    return StoredFile(name, size, whole.hexdigest(), tuple(parts) if len(parts) > 1 else ())


def _lengths(path: Path, size: int) -> list[int]:
    """The lengths of the stretches a safetensors file is cut into; they add up to its size."""
    begin, spans = read_tensor_spans(path)
    least = LEAST_PART
    while sum(end - start >= least for start, end in spans) > _MOST_PARTS // 2:
        least *= 2
    borders = [0]
    for start, end in spans:
        if end - start >= least:
            borders += [begin + start, begin + end]
    borders.append(size)
    return [end - start for start, end in zip(borders, borders[1:], strict=False) if end > start] or [size]


def _read(stream: BinaryIO, length: int, path: Path) -> bytes:
    chunk = stream.read(length)
    if not chunk:
        raise BadInput("changed while it was read", where=str(path), hint="publish it again")
    return chunk
