"""An fsspec filesystem as registries need it: bounded reads, writes that only create, retries, errors for users.

What a filesystem can do differs. `create` is one atomic step where `CONDITIONAL` says so (S3's If-None-Match and its
like); elsewhere it looks first and then writes, which two writers at the same moment can both pass. `replace` is
conditional on S3 (If-Match) and looks first elsewhere. Objects appear whole on object stores; elsewhere they are
written under another name and moved. No message repeats what a client library says: it may hold signed addresses.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.storage import hash_file

__all__ = ["CONDITIONAL", "Filesystem", "Info"]

Info = Mapping[str, Any]
"""What a filesystem tells of an object: `size`, and more of its own."""

CONDITIONAL = frozenset({"s3", "gs", "abfs", "memory"})
_WHOLE = CONDITIONAL | {"oci", "oss", "tos"}
_ONE_CONNECTION = frozenset({"ftp", "sftp", "smb", "hdfs"})
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
    "smb": "smbprotocol",
    "oss": "ossfs",
    "oci": "ocifs",
    "webdav": "webdav4",
}
PIECE = 8 << 20
"""Bytes that travel in one piece: of a download, and of an upload of twice as much or more."""

_ATTEMPTS = 4
_PAUSE = 0.2  # seconds before the second attempt; doubles
_PASSING = frozenset({errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE, errno.EIO})
_CLIENTS = ("aiohttp", "botocore", "google", "azure", "paramiko", "requests", "urllib3")
_FINAL = ("NoCredentials", "PartialCredentials", "ParamValidation", "EndpointConnection", "NoRegion", "Authentication")


class Filesystem:
    """The objects below the folder that a URL names. Names are relative to it, with `/` between parts."""

    def __init__(self, location: str, *, filesystem: Any = None, root: str | None = None) -> None:
        self.location = location
        self.scheme = location.partition("://")[0]
        self.conditional = self.scheme in CONDITIONAL
        self._given = (filesystem, root.rstrip("/")) if filesystem is not None and root is not None else None

    @property
    def workers(self) -> int:
        """How many threads may use it at once."""
        return 1 if self.scheme in _ONE_CONNECTION else 8

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, folder: str) -> dict[str, Info]:
        """name -> info of every object below a folder; empty where there is no such folder."""
        fs, root = self._open()
        start = f"{root}/{folder}" if folder else root
        bare = start.lstrip("/")

        def ask() -> dict[str, Info]:
            fs.invalidate_cache()
            found = {name.lstrip("/"): info for name, info in fs.find(start, detail=True).items()}
            # s3fs tells of the folder itself where the first object in it appears while it looks.
            return {
                name[len(bare) - len(folder) :].lstrip("/"): info
                for name, info in found.items()
                if info.get("type") == "file" and name != bare
            }

        found: dict[str, Info] = self._try(ask, missing={})
        return found

    def info(self, name: str) -> Info | None:
        """None where there is no such object."""
        fs, root = self._open()

        def ask() -> Info | None:
            fs.invalidate_cache()
            found: Info = fs.info(f"{root}/{name}")
            return found if found.get("type") == "file" else None

        told: Info | None = self._try(ask, missing=None)
        return told

    def read(self, name: str, most: int) -> bytes:
        """A small object; raises NotFound, or Corrupt where it is empty or has more than `most` bytes."""
        data = self.range(name, 0, most + 1)
        if not data or len(data) > most:
            what = f"holds more than {most:,} bytes" if data else "is empty"
            raise Corrupt(what, where=f"{self.location}/{name}")
        return data

    def range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object, fewer where it ends before; raises NotFound."""
        fs, root = self._open()

        def ask() -> bytes:
            try:
                return bytes(fs.cat_file(f"{root}/{name}", start=start, end=end))
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""  # it ends before
                raise

        data: bytes | None = self._try(ask, missing=None)
        if data is None:
            raise NotFound("is missing", where=f"{self.location}/{name}")
        return data

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, whatever was there; only for names that say what the content is."""
        fs, _ = self._open()
        self._write_plain(name, lambda path: fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> None:
        """Writes a new object; raises FileExistsError where there is one with other content."""
        fs, root = self._open()
        try:
            if self.conditional:
                self._try(lambda: fs.pipe_file(f"{root}/{name}", data, mode="create"))
            elif self.info(name) is not None:
                raise FileExistsError(name)
            else:
                self.put(name, data)
        except FileExistsError:
            if not self._holds(name, data):
                raise FileExistsError(name) from None

    def replace(self, name: str, data: bytes, mark: str) -> None:
        """Replaces an object; raises FileExistsError where it is no longer the one that had this mark."""
        fs, root = self._open()
        info = self.info(name)
        if info is None or mark_of(info) != mark:
            raise FileExistsError(name)
        if self.scheme != "s3":
            self.put(name, data)
            return
        try:
            self._try(lambda: fs.pipe_file(f"{root}/{name}", data, IfMatch=info["ETag"]), raising=OSError)
        except OSError as error:
            if _code(error) not in ("PreconditionFailed", "412", "NoSuchKey", "404"):
                with self._errors():
                    raise
            if not self._holds(name, data):
                raise FileExistsError(name) from None

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether the object that was in the way is our own: an answer to our writing may have been lost."""
        try:
            return self.read(name, len(data)) == data
        except (NotFound, Corrupt):
            return False

    def upload(self, name: str, source: Path, sha256: str, told: Callable[[int], None]) -> None:
        """Copies a local file there and checks what arrived as far as the place can tell.

        S3 is given the sha256 of what travels in one request and refuses other content; what travels in pieces is
        guarded piece by piece by the client's checksums. Elsewhere the size is compared. Raises Corrupt.
        """
        fs, root = self._open()
        size = source.stat().st_size
        if self.scheme == "s3" and size < 2 * PIECE:
            data = source.read_bytes()
            self._check_own(hashlib.sha256(data).hexdigest() == sha256, source)
            checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
            self._try(lambda: fs.pipe_file(f"{root}/{name}", data, ChecksumSHA256=checksum))
            told(size)
            return
        self._check_own(hash_file(source) == sha256, source)
        settings = {"chunksize": PIECE, "max_concurrency": 4} if self.scheme == "s3" else {}
        self._write_plain(name, lambda path: fs.put_file(str(source), path, **settings))
        told(size)
        arrived = self.info(name)
        if arrived is None or arrived["size"] != size:
            raise Corrupt("another size arrived than was sent", where=f"{self.location}/{name}", hint="run it again")

    def touch(self, name: str, source: Path, sha256: str) -> None:
        """Makes an object new again, so that no sweep takes it: by a copy onto itself on S3, else by writing it."""
        fs, root = self._open()
        if self.scheme == "s3":
            path = f"{root}/{name}"
            self._try(lambda: fs.cp_file(path, path, MetadataDirective="REPLACE"))
        else:
            self.upload(name, source, sha256, lambda count: None)

    def remove(self, name: str) -> None:
        """Removes an object; one that is gone already is no error."""
        fs, root = self._open()
        self._try(lambda: fs.rm_file(f"{root}/{name}"), missing=None)

    def _write_plain(self, name: str, write: Callable[[str], Any]) -> None:
        """Writes so that the object appears whole: at once on object stores, by a move elsewhere."""
        fs, root = self._open()
        path = f"{root}/{name}"
        if self.scheme in _WHOLE:
            self._try(lambda: write(path))
            return
        draft = f"{root}/drafts/{uuid.uuid4().hex}"

        def moved() -> None:
            for folder in {path.rpartition("/")[0], f"{root}/drafts"}:
                fs.makedirs(folder, exist_ok=True)
            write(draft)
            fs.mv(draft, path)

        self._try(moved)

    @staticmethod
    def _check_own(sound: bool, source: Path) -> None:
        if not sound:
            raise Corrupt("damaged: its content does not match its sha256", where=str(source))

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> tuple[Any, str]:
        """The filesystem and the root in it; opened at the first use."""
        if self._given is None:
            import fsspec.core

            settings = {"use_listings_cache": False} if self.scheme == "s3" else {}
            with self._errors():
                filesystem, root = fsspec.core.url_to_fs(self.location, **settings)
            self._given = filesystem, root.rstrip("/")
        return self._given

    def _try(
        self, action: Callable[[], Any], *, missing: Any = FileNotFoundError, raising: type[Exception] | None = None
    ) -> Any:
        """Runs an action, again where the error is one that passes; `missing` is the answer for what is not there."""
        pause = _PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return action()
            except FileExistsError:
                raise
            except Exception as error:  # every client has a tree of its own
                if isinstance(error, FileNotFoundError) and missing is not FileNotFoundError:
                    if _code(error) != "NoSuchBucket":
                        return missing
                elif attempt < _ATTEMPTS and _passes(error):
                    time.sleep(pause * random.uniform(0.75, 1.25))
                    pause *= 2
                    continue
                elif raising is not None and isinstance(error, raising):
                    raise
                with self._errors():
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the errors of client libraries into ours, without their texts."""
        try:
            yield
        except (XpertError, FileExistsError):
            raise
        except ImportError as error:
            package = _PACKAGES.get(self.scheme) or (error.name or "its client").partition(".")[0]
            raise Unavailable(
                f"{self.scheme}:// places need {package}, which is not installed",
                where=self.location,
                hint=f"`pip install {package}`",
            ) from None
        except Exception as error:  # as in `_try`; what no client is known to raise comes out as it was
            raise _told(error, self.location) from None


def mark_of(info: Info) -> str:
    """A mark that changes when the object's content does, from what the filesystem tells of it."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "generation"):
        if info.get(key):
            return str(info[key]).strip('"')
    moment = written(info)
    return f"{info.get('size')}-{moment if moment is not None else info.get('ino', '')}"


def written(info: Info) -> float | None:
    """When an object was written, in seconds since 1970; None where the filesystem does not tell."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return None


def _code(error: BaseException) -> str:
    """The place's own error code, such as NoSuchBucket; empty where it gives none."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code or "")


def _passes(error: Exception) -> bool:
    """Whether it may be gone on the next attempt: a broken connection, a busy place."""
    name = type(error).__name__
    if isinstance(error, (PermissionError, FileNotFoundError)) or name.startswith(_FINAL):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING:
        return True
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _told(error: Exception, location: str) -> Exception:
    """The error for the user. One that no place or client is known to raise is a defect and stays as it is."""
    name, code = type(error).__name__, _code(error)
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and not code):
        return NotFound(
            "there is no such bucket or folder", where=location, hint="make it first, or correct the address"
        )
    if isinstance(error, PermissionError) or "Credentials" in name or "Authentication" in name:
        said = f" ({code})" if code else ""
        hint = "check the credentials in the environment or the client's own files, and what they may do there"
        return BadInput(f"refused: no credentials, wrong ones, or no permission{said}", where=location, hint=hint)
    known = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS
    if not known:
        return error
    if "ParamValidation" in name or code in ("InvalidBucketName", "InvalidRegion", "NoRegion"):
        return BadInput(f"not a valid address ({code or name})", where=location)
    number = getattr(error, "errno", None)
    detail = code or (errno.errorcode.get(number, name) if number else name)
    return Unavailable(
        f"cannot be reached, or failed ({detail})", where=location, hint="try again; what arrived is kept"
    )
