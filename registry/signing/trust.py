"""The trust list: which keys speak for which owners, and what must be signed.

A pattern is `OWNER/NAME`, `OWNER` or `*`; it covers names whatever their case. Of the patterns that cover a name and
have keys, the most specific one decides whose signature counts: the keys of `acme/sums` alone speak for acme/sums,
those of `acme` for acme's other names, those of `*` for owners that have no key. A name with a key by its name or owner
must be signed; a key of `*` demands nothing. A name that a `required` pattern covers must be signed too, and is refused
where no key speaks for it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.registry.signing.keys import PublicKey, check_comment
from xpert.registry.signing.signatures import KEY_BYTES, Signature, decode, fingerprint, verify
from xpert.registry.strict_json import parse_json
from xpert.registry.versions import Record
from xpert.storage import config_folder, disk_errors, exclusive, write_json

__all__ = [
    "TrustEntry",
    "TrustList",
    "Verdict",
    "check_pattern",
    "edit_trust",
    "trust_path",
]

ENVIRONMENT = "XPERT_TRUST"
SCHEMA = 1
_MOST_BYTES = 4 << 20
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_PATTERN = re.compile(rf"\*|{_PART}(/{_PART})?")
_LEAST_FINGERPRINT = 8


@dataclass(frozen=True)
class TrustEntry:
    """A key and the pattern it speaks for."""

    pattern: str
    key: str
    comment: str = ""
    added: str = ""

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if decode(self.key, KEY_BYTES) is None:
            raise BadInput(f"the key for {self.pattern} is no Ed25519 key")
        check_comment(self.comment)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


@dataclass(frozen=True)
class Verdict:
    """Whether a version may be used, the trusted key (base64) that signed it if any, and the reason in words."""

    ok: bool
    by: str | None
    reason: str


@dataclass(frozen=True)
class TrustList:
    """`trust.json`. An absent one trusts nothing and demands nothing."""

    entries: tuple[TrustEntry, ...] = ()
    required: tuple[str, ...] = ()

    def judge(self, record: Record, signatures: Sequence[Signature], *, required: bool = False) -> Verdict:
        """Whether the list lets a version be used. `required` demands a signature whatever the list says.

        Every signature is checked, not the trusted ones alone: raises Corrupt where one does not verify, since then
        someone changed the version or forged the signature. Raises Unavailable where there are signatures and the
        package `cryptography` is missing.
        """
        version = record.version
        for made in signatures:
            if not verify(made, record):
                raise Corrupt(
                    f"the signature by {fingerprint(made.key)} does not match this version",
                    where=version.ref,
                    hint="somebody changed the version or forged the signature: do not use it",
                )
        pattern, keys = self.speakers(version.name)
        for made in signatures:
            if made.key in keys:
                return Verdict(True, made.key, f"signed by {keys[made.key] or fingerprint(made.key)}, trusted")
        found = _found(signatures)
        if pattern not in (None, "*"):
            return Verdict(False, None, f"{found}, but must be signed by a key of {pattern}")
        if required or any(covers(name, version.name) for name in self.required):
            whose = "and no key is trusted for it" if pattern is None else "but must be signed by a trusted key"
            return Verdict(False, None, f"{found}, {whose}")
        besides = ", not trusted for it" if signatures else ""
        return Verdict(True, None, f"{found}{besides}; nothing demands a trusted signature")

    def enforce(self, record: Record, signatures: Sequence[Signature], *, required: bool = False) -> Verdict:
        """The verdict; raises BadInput where it is a refusal, Corrupt for a signature that does not verify."""
        verdict = self.judge(record, signatures, required=required)
        if not verdict.ok:
            raise BadInput(
                f"refused by the trust list: it is {verdict.reason}",
                where=record.version.ref,
                hint="`xpert registry trust list` shows whom you trust",
            )
        return verdict

    def speakers(self, name: str) -> tuple[str | None, dict[str, str]]:
        """The pattern that decides for a name, and its keys with their comments; None where no key speaks for it."""
        owner = name.partition("/")[0]
        for pattern in (name, owner, "*"):
            keys = {e.key: e.comment for e in self.entries if e.pattern.casefold() == pattern.casefold()}
            if keys:
                return pattern, keys
        return None, {}

    def named(self, key: str) -> str:
        """The comment that the list has for a key, or ""."""
        return next((entry.comment for entry in self.entries if entry.key == key and entry.comment), "")

    def with_key(self, key: PublicKey, pattern: str) -> TrustList:
        """Adds a key for a pattern; one that is there already gets the new comment."""
        entry = TrustEntry(pattern, key.key, key.comment, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        kept = [e for e in self.entries if (e.pattern.casefold(), e.key) != (pattern.casefold(), key.key)]
        return dataclasses.replace(self, entries=(*kept, entry))

    def without_key(self, text: str, pattern: str | None = None) -> tuple[TrustList, tuple[TrustEntry, ...]]:
        """Removes a key by (the beginning of) its fingerprint, for one pattern or all; the list and what went.

        Raises NotFound where there is none, BadInput where several keys begin so.
        """
        if pattern is not None:
            check_pattern(pattern)
        matching = [
            entry
            for entry in self.entries
            if len(text) >= _LEAST_FINGERPRINT
            and entry.fingerprint.startswith(text.lower())
            and (pattern is None or entry.pattern.casefold() == pattern.casefold())
        ]
        if not matching:
            raise NotFound(
                f"no trusted key has the fingerprint {text!r}" + (f" for {pattern}" if pattern else ""),
                hint=f"`xpert registry trust list` shows them; give at least {_LEAST_FINGERPRINT} digits",
            )
        if len({entry.key for entry in matching}) > 1:
            raise BadInput(f"several trusted keys begin with {text!r}", hint="give more digits")
        kept = tuple(entry for entry in self.entries if entry not in matching)
        return dataclasses.replace(self, entries=kept), tuple(matching)

    def freed_by(self, gone: Sequence[TrustEntry]) -> list[str]:
        """The patterns whose last key was among `gone`, so that what is unsigned of them is let through again."""
        without = [entry.pattern for entry in gone if not any(entry.pattern == other.pattern for other in self.entries)]
        return [pattern for pattern in without if pattern != "*" and not any(covers(r, pattern) for r in self.required)]

    def requiring(self, pattern: str, *, drop: bool = False) -> TrustList:
        """Demands signatures of what a pattern covers, or no longer; raises NotFound where it did not."""
        check_pattern(pattern)
        kept = tuple(one for one in self.required if one.casefold() != pattern.casefold())
        if drop and len(kept) == len(self.required):
            raise NotFound(f"no signature is required of {pattern!r}", hint="`xpert registry trust list` shows of what")
        return dataclasses.replace(self, required=kept if drop else (*kept, pattern))

    def to_dict(self) -> dict[str, Any]:
        keys = [
            {"for": entry.pattern, "key": entry.key, "comment": entry.comment, "added": entry.added}
            for entry in self.entries
        ]
        return {"kind": "trust", "schema": SCHEMA, "keys": keys, "required": list(self.required)}

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> TrustList:
        """Raises Corrupt for anything that is not wholly understood: a list half read would trust too much."""
        if not isinstance(value, dict) or value.get("kind") != "trust" or type(value.get("schema")) is not int:
            raise Corrupt("not a trust list", where=where)
        if value["schema"] > SCHEMA:
            raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
        try:
            if value.keys() != {"kind", "schema", "keys", "required"}:
                raise ValueError("it has kind, schema, keys and required, and nothing else")
            entries = tuple(
                TrustEntry(entry["for"], entry["key"], **{k: v for k, v in entry.items() if k not in ("for", "key")})
                for entry in value["keys"]
            )
            return cls(entries, tuple(check_pattern(pattern) for pattern in value["required"]))
        except (KeyError, TypeError, ValueError, AttributeError, BadInput) as error:
            raise Corrupt(
                f"the trust list is damaged: {error}", where=where, hint="mend it, or remove it and add the keys again"
            ) from None

    @classmethod
    def read(cls, path: Path | None = None) -> TrustList:
        """The list at `path`, or the user's. An absent one is empty, save where $XPERT_TRUST names it: NotFound."""
        named = path is not None or bool(os.environ.get(ENVIRONMENT))
        path = path or trust_path()
        try:
            with path.open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
        except FileNotFoundError:
            if named:
                raise NotFound(
                    f"no such trust list, which ${ENVIRONMENT} names",
                    where=str(path),
                    hint="`xpert registry trust add` makes it",
                ) from None
            return cls()
        except OSError as error:
            raise BadInput(f"the trust list cannot be read ({error.strerror})", where=str(path)) from None
        if len(data) > _MOST_BYTES:
            raise Corrupt(f"more than {_MOST_BYTES:,} bytes, which no trust list has", where=str(path))
        return cls.from_dict(parse_json(data, where=str(path)), where=str(path))


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern covers `owner/name`, whatever the case: a look-alike in capitals may not slip through."""
    folded = name.casefold()
    return pattern == "*" or pattern.casefold() in (folded, folded.partition("/")[0])


def check_pattern(pattern: str) -> str:
    """Returns `pattern`; raises BadInput unless it is OWNER/NAME, OWNER or `*`."""
    if not isinstance(pattern, str) or _PATTERN.fullmatch(pattern) is None:
        raise BadInput(f"{pattern!r} covers no names", hint="write OWNER, OWNER/NAME, or '*' for all")
    return pattern


def trust_path() -> Path:
    """`$XPERT_TRUST`, or `trust.json` in the user's configuration."""
    set_by_user = os.environ.get(ENVIRONMENT)
    return Path(set_by_user).expanduser() if set_by_user else config_folder() / "trust.json"


def edit_trust(change: Callable[[TrustList], TrustList]) -> TrustList:
    """Changes the user's list, one process after the other, and returns the new one."""
    path = trust_path()
    with disk_errors(path), exclusive(path.with_name(f".{path.name}.lock")):
        changed = change(TrustList.read(path) if path.exists() else TrustList())
        write_json(path, changed.to_dict())
    return changed


def _found(signatures: Sequence[Signature]) -> str:
    if not signatures:
        return "unsigned"
    shown = ", ".join(fingerprint(made.key) for made in signatures[:3])
    return f"signed by {shown}{' and others' if len(signatures) > 3 else ''}"
