"""The hidden folder beside the expert in which training happens, and the checkpoints it goes on from.

It lies at `.<name>.training-<key>/`, the key being a hash of all that shapes the result: the same command finds its
own work again, and another configuration does not meet it. A checkpoint counts only with its seal, which is written
last and holds the hash of every file; one torn by a crash is passed over for the one before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt
from xpert.storage import disk_errors, hash_file, read_json, write_json

__all__ = ["last_checkpoint", "other_work", "remove_work", "seal", "steps_done", "work_folder"]

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _path(out: Path, key: str) -> Path:
    return out.parent / f".{out.name}.training-{key[:12]}"


@contextmanager
def work_folder(out: Path, key: str, *, lock: bool = True) -> Iterator[Path]:
    """The work folder of this configuration, locked against a second run for as long as the block lasts.

    Of the processes of one distributed run, only the main one takes the lock.
    """
    import fcntl

    folder = _path(out, key)
    with disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as held:
            try:
                if lock:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput("another process is training this expert", where=str(out)) from None
            yield folder


def other_work(out: Path, key: str) -> list[Path]:
    """Work folders of the same expert under other configurations."""
    own = _path(out, key)
    return sorted(path for path in out.parent.glob(f".{out.name}.training-*") if path != own)


def remove_work(out: Path, key: str) -> None:
    """Removes the work folder, and what other configurations left for this expert: its place is taken now."""
    for folder in (_path(out, key), *other_work(out, key)):
        shutil.rmtree(folder, ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Marks a checkpoint as whole: the hash of each of its files, after they have reached the disk."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    for path in files:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): hash_file(path) for path in files})


def last_checkpoint(work: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the torn ones met before it."""
    found = [(int(match[1]), path) for path in work.iterdir() if (match := _NAME.fullmatch(path.name))]
    torn: list[Path] = []
    for _, path in sorted(found, reverse=True):
        if _is_whole(path):
            return path, torn
        torn.append(path)
    return None, torn


def steps_done(checkpoint: Path) -> tuple[int, int]:
    """(steps done, steps planned) of a checkpoint."""
    state: dict[str, Any] = read_json(checkpoint / "trainer_state.json")
    return int(state["global_step"]), int(state["max_steps"])


def _is_whole(checkpoint: Path) -> bool:
    with suppress(BadInput, Corrupt, OSError, AttributeError):
        sealed = read_json(checkpoint / SEAL)
        return all(hash_file(checkpoint / name) == digest for name, digest in sealed.items())
    return False
