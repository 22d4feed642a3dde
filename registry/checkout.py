"""Versions copied out of the store: every byte is checked on its way, and a folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from xpert.progress import Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.content import check_stored
from xpert.registry.versions import Record
from xpert.storage import cache_folder, disk_errors, draft_folder, exclusive, hash_file

__all__ = ["check_out", "check_out_to_cache"]


def check_out(blobs: BlobStore, record: Record, target: Path) -> Path:
    """Writes a version's files to the new folder `target`."""
    with draft_folder(target) as draft:
        _fill(blobs, record, draft)
    return target


def check_out_to_cache(blobs: BlobStore, record: Record, progress: Progress) -> Path:
    """The version's folder in the cache, under its digest; made where it is not there, made again where damaged."""
    target = cache_folder() / "experts" / record.version.digest
    if is_sound(target, record):
        return target
    # Another process that makes this folder would remove what this one is about to hand out.
    with disk_errors(target), exclusive(target.parent.parent / "locks" / target.name):
        if is_sound(target, record):  # another process has made it meanwhile
            return target
        if target.exists():
            progress.say(f"the cached copy of {record.version.ref} was changed or damaged; copying it again")
            aside = target.with_name(f".{target.name}.draft-{os.getpid()}-{uuid.uuid4().hex[:8]}")
            target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        return check_out(blobs, record, target)


def is_sound(folder: Path, record: Record) -> bool:
    """Whether the folder holds exactly the version's files. Reads them all."""
    if folder.is_symlink() or not folder.is_dir() or any(path.is_symlink() for path in folder.rglob("*")):
        return False  # what a link leads to can be exchanged without the folder changing
    try:
        held = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
        return held.keys() == {file.path for file in record.files} and all(
            held[file.path].stat().st_size == file.size and hash_file(held[file.path]) == file.sha256
            for file in record.files
        )
    except FileNotFoundError:
        return False  # another process is just making it again


def _fill(blobs: BlobStore, record: Record, folder: Path) -> None:
    for file in record.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.copy(file, target, what=f"{record.version.ref}: {file.path}")
        check_stored(target, where=f"{record.version.ref}: {file.path}")
