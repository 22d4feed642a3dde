"""Garbage of a registry: what no version needs any more."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.record_folder import RecordFolder

__all__ = ["Garbage", "garbage_of"]


@dataclass(frozen=True)
class Garbage:
    """What `gc` removed, or would remove: its files, and their bytes in sum."""

    files: int
    size: int


def garbage_of(records: RecordFolder, blobs: BlobStore, drafts: Drafts) -> list[Path]:
    """Contents that no version needs, copies of documents no longer in force, and drafts of processes that have ended.

    Raises Corrupt where a record cannot be read: what it needs would then be unknown. Cost: reads every document once.
    """
    needed: set[str] = set()
    in_force: set[str] = set()
    ended: list[Path] = []
    for document in records.documents():
        if document.kind in ("record", "signatures"):
            assert document.version is not None
            if records.removed(document.name, document.version):
                ended.append(records.path(document))  # its remover died after the mark
                continue
        if document.kind == "record":
            assert document.version is not None
            for file in records.read(document.name, document.version).files:
                needed.update(part.sha256 for part in file.blobs)
        in_force.add(hashlib.sha256(records.read_bytes(document)).hexdigest())
    garbage = [path for sha256, path in blobs.all() if sha256 and sha256 not in needed]
    garbage += [path for sha256, path in records.copies.all() if sha256 and sha256 not in in_force]
    return [*garbage, *ended, *drafts.stale()]
