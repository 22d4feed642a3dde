"""Signatures of versions (Ed25519): who vouches that this name and number have this content.

records/OWNER/NAME@3.signatures.json    the signatures of version 3; replaced when one is added

A signature is over the name, the number, the kind, the content's digest and the record's checksum, so it fits no other
version. Signing and checking are those of the package `cryptography` (RFC 8032); nothing of it is loaded before it is
needed.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from xpert.errors import BadInput, Corrupt, Unavailable
from xpert.registry.documents import MOST_NUMBER, SCHEMA, document_bytes
from xpert.registry.names import check_name
from xpert.registry.versions import Record
from xpert.storage import hash_json

__all__ = [
    "KEY_BYTES",
    "MOST_SIGNATURES",
    "Signature",
    "SignatureList",
    "decode",
    "fingerprint",
    "load_ed25519",
    "statement",
    "verify",
]

KEY_BYTES, SIGNATURE_BYTES = 32, 64
MOST_SIGNATURES = 64
_SHORT = 24  # hex digits of a fingerprint that are shown: 96 bits
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True, order=True, slots=True)
class Signature:
    """One signature: the signer's public key and the signature, both base64 of the raw bytes.

    `signed` is the time that the signer stated; it is not signed itself, and nothing is decided by it.
    """

    signed: str
    key: str
    signature: str

    def __post_init__(self) -> None:
        if decode(self.key, KEY_BYTES) is None or decode(self.signature, SIGNATURE_BYTES) is None:
            raise BadInput("a signature has no sound key and value")
        if not isinstance(self.signed, str) or _TIME.fullmatch(self.signed) is None:
            raise BadInput("a signature has no sound time")


@dataclass(frozen=True)
class SignatureList:
    """All signatures of one version; `revision` counts the changes of the list."""

    name: str
    version: int
    signatures: tuple[Signature, ...] = ()
    revision: int = 0

    def __post_init__(self) -> None:
        if len(self.signatures) > MOST_SIGNATURES:
            raise BadInput(f"{self.ref} has more than {MOST_SIGNATURES} signatures")

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    def merged(self, other: SignatureList) -> SignatureList:
        """The signatures of both lists, each once (of a repeated one the earlier time stays); raises BadInput above 64.

        The revision rises where the outcome is not the newer of the two.
        """
        if other.ref != self.ref:
            raise ValueError(f"lists of {self.ref} and {other.ref}")
        earliest: dict[tuple[str, str], Signature] = {}
        for made in sorted((*self.signatures, *other.signatures)):
            earliest.setdefault((made.key, made.signature), made)
        union = tuple(sorted(earliest.values()))
        newest = max(self.revision, other.revision)
        known = any(one.revision == newest and one.signatures == union for one in (self, other))
        same = self.revision != other.revision or self.signatures == other.signatures
        return SignatureList(self.name, self.version, union, newest if known and same else newest + 1)

    def to_dict(self) -> dict[str, Any]:
        value = {
            "schema": SCHEMA,
            "kind": "signatures",
            "name": self.name,
            "version": self.version,
            "revision": self.revision,
            "signatures": [dataclasses.asdict(made) for made in sorted(self.signatures)],
        }
        return value | {"checksum": hash_json(value)}

    def to_bytes(self) -> bytes:
        return document_bytes(self.to_dict())

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> SignatureList:
        """Raises Corrupt where it is damaged or no such list, BadInput for a newer schema."""
        if not isinstance(value, dict) or value.get("kind") != "signatures" or type(value.get("schema")) is not int:
            raise Corrupt("not a list of signatures", where=where)
        if value["schema"] > SCHEMA:
            raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
        plain = {key: item for key, item in value.items() if key != "checksum"}
        try:
            if value.get("checksum") != hash_json(plain):
                raise Corrupt("damaged: the signatures do not match their checksum", where=where)
            made = plain.pop("signatures")
            if not isinstance(made, list) or len(made) > MOST_SIGNATURES:
                raise ValueError("not a list of at most 64 signatures")
            del plain["schema"], plain["kind"]
            found = cls(signatures=tuple(Signature(**entry) for entry in made), **plain)
            check_name(found.name)
            if any(
                type(number) is not int or not 0 <= number <= MOST_NUMBER for number in (found.version, found.revision)
            ):
                raise ValueError("its numbers are unsound")
        except Corrupt:
            raise
        except (KeyError, TypeError, ValueError, BadInput) as error:
            raise Corrupt(f"the list of signatures is damaged: {error}", where=where) from None
        return found


def statement(record: Record) -> bytes:
    """What is signed: canonical JSON that binds a version's name, number, kind, content and record."""
    version = record.version
    said = {
        "what": "xpert version",
        "schema": 1,
        "name": version.name,
        "version": version.version,
        "kind": version.kind,
        "digest": version.digest,
        "checksum": record.checksum,
    }
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def verify(signature: Signature, record: Record) -> bool:
    """Whether the signature was made by its key for exactly this version. Raises Unavailable without `cryptography`."""
    ed25519 = load_ed25519()
    from cryptography.exceptions import InvalidSignature

    key, value = decode(signature.key, KEY_BYTES), decode(signature.signature, SIGNATURE_BYTES)
    if key is None or value is None:
        return False
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(key).verify(value, statement(record))
    except (InvalidSignature, ValueError):
        return False
    return True


def load_ed25519() -> ModuleType:
    """The Ed25519 of `cryptography`; raises Unavailable where it is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise Unavailable(
            "signatures need the package `cryptography`, which is not installed",
            hint="run: pip install 'xpert-toolkit[sign]'",
        ) from None
    return ed25519


def fingerprint(key: str) -> str:
    """The name of a public key (base64) for people: the first 24 hex digits of the sha256 of its bytes."""
    return hashlib.sha256(base64.b64decode(key)).hexdigest()[:_SHORT]


def decode(text: object, size: int) -> bytes | None:
    """The bytes of a base64 text in its one canonical form, or None where it is not that or has another size."""
    if not isinstance(text, str) or len(text) > 4 * size:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) == size and base64.b64encode(data).decode() == text else None
