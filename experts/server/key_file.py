"""The file of API keys: who holds one, what its holder may ask for, and the key's digest; never the key itself.

    {"keys": [{"name": "ada", "sha256": "…64 hex digits…", "created": "2026-01-31T12:00:00Z",
               "requests_per_minute": 60, "tokens_per_minute": 20000, "concurrent": 4, "models": ["me/dates"]}]}

The four limits may be left out: what is not limited has no field. A key is `xp-` and 32 random bytes in URL-safe
base64. Its digest is a plain sha256: a slow hash guards passwords, which people choose and others guess; 256 random
bits are not guessed at any speed, and a slow hash would only make every request slow.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, unknown
from xpert.storage import disk_errors, exclusive, read_json

__all__ = ["KeyHolder", "add_key", "digest", "read_keys", "remove_key"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class KeyHolder:
    """Whose key it is and what may be asked with it; None is no limit. `models` are ids as `/v1/models` lists them."""

    name: str
    sha256: str
    created: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    models: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raises BadInput naming what is wrong: a misread limit would be no limit."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise BadInput(
                f"{self.name!r} is no name for a key", hint="letters, digits and . _ @ -, at most 64, a letter first"
            )
        if not isinstance(self.sha256, str) or not _DIGEST.fullmatch(self.sha256):
            raise BadInput(f"{self.name}: sha256 must be 64 hexadecimal digits in small letters")
        if not isinstance(self.created, str):
            raise BadInput(f"{self.name}: created must be a text")
        for limit in _LIMITS:
            value = getattr(self, limit)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BadInput(f"{self.name}: {limit} must be a whole number of at least 1, not {value!r}")
        if self.models is not None:
            if not self.models or not all(isinstance(model, str) and model for model in self.models):
                raise BadInput(f"{self.name}: models must name at least one", hint="leave it out to allow all")

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models

    def to_dict(self) -> dict[str, Any]:
        """The entry in the file."""
        value = {name: item for name, item in asdict(self).items() if item is not None}
        return value | ({"models": list(self.models)} if self.models is not None else {})


_FIELDS = tuple(field.name for field in fields(KeyHolder))


def digest(key: str) -> str:
    """sha256 of a key, hex. What a client presents may be any text."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> tuple[KeyHolder, ...]:
    """The file's entries in order. Raises NotFound, or Corrupt where an entry has an unknown field or a bad value."""
    value = read_json(path, most=_MOST_BYTES)
    where = str(path)
    if not isinstance(value, dict) or set(value) != {"keys"} or not isinstance(value["keys"], list):
        raise Corrupt('not a file of API keys: it must be {"keys": [...]}', where=where)
    found = tuple(_holder(entry, where) for entry in value["keys"])
    for field in ("name", "sha256"):
        values = [getattr(holder, field) for holder in found]
        if len(set(values)) < len(values):
            raise Corrupt(f"two of its keys have the same {field}", where=where)
    return found


def add_key(
    path: Path,
    name: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent: int | None = None,
    models: tuple[str, ...] | None = None,
) -> tuple[KeyHolder, str]:
    """Makes a key for `name`, files its digest and returns the key, which is nowhere else and cannot be found again.

    A file that is not there is made, readable by its owner alone. Raises BadInput where the name is taken.
    """
    key = f"xp-{secrets.token_urlsafe(32)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made = KeyHolder(name, digest(key), created, requests_per_minute, tokens_per_minute, concurrent, models)

    def with_key(holders: tuple[KeyHolder, ...]) -> tuple[KeyHolder, ...]:
        if any(holder.name == name for holder in holders):
            raise BadInput(
                f"there is a key named {name!r}", where=str(path), hint="remove that one first, or name this otherwise"
            )
        return (*holders, made)

    _change(path, with_key, new=True)
    return made, key


def remove_key(path: Path, name: str) -> KeyHolder:
    """Takes a key out of the file; a running server refuses it from its next request on. Raises NotFound."""
    gone: list[KeyHolder] = []

    def without_key(holders: tuple[KeyHolder, ...]) -> tuple[KeyHolder, ...]:
        gone.extend(holder for holder in holders if holder.name == name)
        if not gone:
            raise unknown("key", name, (holder.name for holder in holders), where=str(path))
        return tuple(holder for holder in holders if holder.name != name)

    _change(path, without_key, new=False)
    return gone[0]


def _holder(entry: Any, where: str) -> KeyHolder:
    if not isinstance(entry, dict):
        raise Corrupt("each of its keys must be a JSON object", where=where)
    named = entry.get("name", "a key without a name")
    for field in entry:
        if field not in _FIELDS:
            wrong = unknown("field", field, _FIELDS)
            raise Corrupt(f"{named}: {wrong.what}", where=where, hint=wrong.hint)
    for field in ("name", "sha256", "created"):
        if field not in entry:
            raise Corrupt(f"{named}: {field} is missing", where=where)
    given = dict(entry)
    if given.get("models") is not None:
        if not isinstance(given["models"], list):
            raise Corrupt(f"{named}: models must be a list", where=where)
        given["models"] = tuple(given["models"])
    try:
        return KeyHolder(**given)
    except BadInput as error:
        raise Corrupt(error.what, where=where, hint=error.hint) from None


def _change(path: Path, change: Callable[[tuple[KeyHolder, ...]], tuple[KeyHolder, ...]], *, new: bool) -> None:
    """Writes the file anew, whole, while no other process changes it. A link stays, and what it points to changes."""
    import json

    with disk_errors(path):
        target = path.resolve()
        if new:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            raise NotFound("no such file", where=str(path), hint="`xpert keys add` makes one")
        with exclusive(target.with_name(f".{target.name}.lock")):
            holders = change(read_keys(path) if target.exists() else ())
            value = {"keys": [holder.to_dict() for holder in holders]}
            _write_private(target, (json.dumps(value, indent=2) + "\n").encode())


def _write_private(target: Path, data: bytes) -> None:
    """As `storage.write_file`, never readable by others on the way; mode and owner of the file before it are kept, so
    that the server's user can still read what an administrator has changed."""
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    before = target.stat() if target.exists() else None
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(data)
            if before is not None:
                os.fchmod(stream.fileno(), before.st_mode & 0o777)
                with suppress(PermissionError):  # only root may give a file away; others own theirs already
                    os.fchown(stream.fileno(), before.st_uid, before.st_gid)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
