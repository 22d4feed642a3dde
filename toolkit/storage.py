"""Artifacts on disk: folders that appear whole or not at all, manifests, content hashes, and where caches lie."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError

__all__ = [
    "MANIFEST",
    "alive",
    "cache_folder",
    "check_output",
    "config_folder",
    "data_folder",
    "disk_errors",
    "disk_is_full",
    "draft_folder",
    "exclusive",
    "hash_file",
    "hash_json",
    "hash_texts",
    "manifest_value",
    "package_versions",
    "read_json",
    "read_manifest",
    "write_file",
    "write_json",
    "write_manifest",
]

MANIFEST = "manifest.json"
_DRAFT_MARK = ".draft-"
# safetensors and pyarrow; SQLite; torch.save, which finds its file shorter than what it wrote
_FULL_DISK_WORDS = ("No space left on device", "database or disk is full", "PytorchStreamWriter", "unexpected pos ")


def cache_folder() -> Path:
    """`$XPERT_CACHE`, or xpert's folder in the user's cache. What lies in it can be made again."""
    set_by_user = os.environ.get("XPERT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(set_by_user) if set_by_user else Path(base) / "xpert"


def config_folder() -> Path:
    """xpert's folder among the user's settings; the trust list lies in it."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "xpert"


def data_folder() -> Path:
    """xpert's folder among the user's data; the default registry lies in it."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "xpert"


@contextmanager
def draft_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that takes its name once the block ends well, and vanishes otherwise.

    Raises BadInput where `target` exists and may not be replaced. Drafts of dead processes are swept away.
    """
    target = Path(target)
    check_output(target, replace=replace)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        draft = target.parent / f".{target.name}{_DRAFT_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        draft.mkdir()
        try:
            yield draft
            _sync_tree(draft)
            _give_name(draft, target, replace=replace)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def check_output(target: Path, *, replace: bool = False) -> None:
    """Refuses an output path that is taken; call it before the work, not after."""
    with disk_errors(target):
        if target.is_dir() and not any(target.iterdir()):
            return
        taken = target.exists()
    if taken and not replace:
        raise BadInput("the output exists already", where=str(target), hint="choose another -o, or remove it")


@contextmanager
def exclusive(lock: Path, *, wait_seconds: float | None = None) -> Iterator[None]:
    """No other process or thread holds this lock meanwhile; it is a file of its own, which stays.

    A link in its place is not followed. Raises TimeoutError where others hold it for longer than `wait_seconds`;
    without a limit it waits.
    """
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if wait_seconds is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            end = time.monotonic() + wait_seconds
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise TimeoutError(f"{lock} stays locked") from None
                    time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into an error the user can act on."""
    try:
        yield
    except XpertError:
        raise
    except Exception as error:
        where, code = str(_final(target)), getattr(error, "errno", None)
        if disk_is_full(error):
            raise Unavailable("the disk is full", where=where, hint="free some space and run it again") from None
        if code == errno.EFBIG:
            raise Unavailable(
                "a file would be larger than is allowed here", where=where, hint="raise `ulimit -f`"
            ) from None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BadInput(
                "may not be written", where=where, hint="choose another place, or change who may write there"
            ) from None
        if code in (errno.ENOTDIR, errno.EEXIST):  # EEXIST: a folder was to be made where a file is
            raise BadInput("a part of the path is a file", where=where, hint="choose another place") from None
        raise


def disk_is_full(error: Exception) -> bool:
    """Whether an error is a full disk's: by its number, or by the words of writers that have errors of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in _FULL_DISK_WORDS)


def _final(path: Path) -> Path:
    """The path that the user will see: without the names of drafts."""
    names = (part[1:].split(_DRAFT_MARK)[0] if _DRAFT_MARK in part else part for part in path.parts)
    return Path(*names)


def write_file(target: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}{_DRAFT_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            with open(draft, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """Indented JSON with sorted keys, written whole. NaN is refused, since it is not JSON."""
    write_file(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, most: int = 256 << 20) -> Any:
    """Raises NotFound where there is no such file, Corrupt where it is not JSON or has more than `most` bytes."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(most + 1)
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path)) from None
    if len(data) > most:
        raise Corrupt(f"more than {most:,} bytes", where=str(path))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not valid JSON: {error}", where=str(path)) from None


def write_manifest(
    folder: Path,
    kind: str,
    *,
    schema: int = 1,
    inputs: Mapping[str, Any],
    config: Mapping[str, Any],
    seed: int | None,
    figures: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
) -> None:
    """`manifest.json`: how an artifact came to be. `inputs` name what it was made of by content hash."""
    value = manifest_value(
        kind, schema=schema, inputs=inputs, config=config, seed=seed, figures=figures, timings=timings
    )
    write_json(folder / MANIFEST, value)


def manifest_value(
    kind: str,
    *,
    schema: int = 1,
    inputs: Mapping[str, Any],
    config: Mapping[str, Any],
    seed: int | None,
    figures: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What a manifest says; for an artifact that is one file it stands beside it."""
    return {
        "kind": kind,
        "schema": schema,
        "inputs": dict(inputs),
        "config": dict(config),
        "seed": seed,
        "figures": dict(figures or {}),
        "timings": {name: round(seconds, 3) for name, seconds in (timings or {}).items()},
        "versions": package_versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_manifest(folder: Path, kind: str, *, schema: int = 1) -> dict[str, Any]:
    """The manifest of an artifact of this kind; raises BadInput where the folder holds something else."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFound(f"not a {kind} folder: it has no {MANIFEST}", where=str(folder))
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else None
        raise BadInput(f"holds a {found or 'nameless thing'}, not a {kind}", where=str(folder))
    if manifest.get("schema", 0) > schema:
        raise BadInput(f"written by a newer xpert (schema {manifest['schema']})", where=str(path), hint="upgrade xpert")
    return manifest


def package_versions() -> dict[str, str]:
    """Versions of Python, xpert and the packages that shape results; those not installed are left out."""
    import importlib.metadata  # takes a while to load, and most who come here write no manifest

    versions = {"python": platform.python_version()}
    for name in ("xpert-toolkit", "torch", "transformers", "peft", "trl", "faiss-cpu", "scikit-learn", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON, hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """sha256 over texts, each framed by its length so that no two sequences collide by joining, hex."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _give_name(draft: Path, target: Path, *, replace: bool) -> None:
    if not replace or not target.exists():
        try:
            os.rename(draft, target)
        except OSError:
            # Another process has made it since `check_output`.
            check_output(target, replace=replace)
            raise
        return
    # A folder with content cannot be renamed over: the old one steps aside first, and comes back if that fails.
    aside = target.parent / f".{target.name}{_DRAFT_MARK}{os.getpid()}-old"
    os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        os.rename(aside, target)
        raise
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def _sweep(target: Path) -> None:
    for stale in target.parent.glob(f".{target.name}{_DRAFT_MARK}*"):
        process = stale.name.split(_DRAFT_MARK)[1].split("-")[0]
        if process.isdigit() and not alive(int(process)):
            shutil.rmtree(stale, ignore_errors=True)


def alive(process: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
