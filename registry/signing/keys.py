"""Keys for signing: an Ed25519 private key in a PKCS8 PEM file that only its owner may read, and its public line.

FILE        -----BEGIN PRIVATE KEY----- or -----BEGIN ENCRYPTED PRIVATE KEY-----, mode 0600
FILE.pub    xpert-ed25519 BASE64 COMMENT
"""

from __future__ import annotations

import base64
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from xpert.errors import BadInput, NotFound
from xpert.registry.signing.signatures import KEY_BYTES, Signature, decode, fingerprint, load_ed25519, statement
from xpert.registry.versions import Record
from xpert.storage import disk_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["ENVIRONMENT", "PublicKey", "SigningKey", "check_comment", "passphrase_from", "signing_key_path"]

ENVIRONMENT = "XPERT_SIGNING_KEY"
KIND = "xpert-ed25519"
_MOST_BYTES = 16_384
_COMMENT = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]{0,128}")

Passphrase = Callable[[], bytes | None]


@dataclass(frozen=True)
class PublicKey:
    """What others need to check one's signatures: the key (base64 of the raw 32 bytes) and whose it says it is."""

    key: str
    comment: str = ""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)

    @property
    def line(self) -> str:
        return f"{KIND} {self.key} {self.comment}".rstrip()

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """The key of a `.pub` file; raises BadInput for anything else, private keys above all."""
        data, _ = _read_small(path)
        if b"PRIVATE KEY" in data:
            raise BadInput("a private key", where=str(path), hint=f"the public one is beside it: {path.name}.pub")
        lines = data.decode("utf-8", "replace").splitlines()
        kind, _, rest = lines[0].partition(" ") if len(lines) == 1 else ("", "", "")
        key, _, comment = rest.strip().partition(" ")
        if kind != KIND or decode(key, KEY_BYTES) is None:
            raise BadInput(
                "not a public key",
                where=str(path),
                hint=f"it is one line `{KIND} BASE64 COMMENT`, as `xpert registry keygen` writes it",
            )
        return cls(key, check_comment(comment.strip(), where=str(path)))


@dataclass(frozen=True)
class SigningKey:
    """A private key, ready to sign. Its content is never printed: `repr` shows the public part."""

    public: PublicKey
    _private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"SigningKey({self.public.fingerprint})"

    @classmethod
    def load(cls, path: Path, passphrase: Passphrase = lambda: None) -> Self:
        """Reads a private key; `passphrase` is asked only where the file is encrypted.

        Raises NotFound, BadInput for a file that others may read, of another kind, or with a wrong passphrase, and
        Unavailable without the package `cryptography`.
        """
        ed25519 = load_ed25519()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        where = str(path)
        data, mode = _read_small(path)
        if b"-----BEGIN " not in data or b"PRIVATE KEY-----" not in data:
            hint = "the private key is the file without .pub" if data.startswith(KIND.encode()) else _MAKE
            raise BadInput("not a private key", where=where, hint=hint)
        if mode is not None and mode & 0o077:
            raise BadInput("others may read this private key", where=where, hint=f"run chmod 600 {path}")
        secret = None
        if b"ENCRYPTED" in data:
            secret = passphrase()
            if not secret:
                raise BadInput("the key is encrypted", where=where, hint="give --passphrase-file FILE")
        try:
            private = load_pem_private_key(data, secret)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            if secret:
                raise BadInput("the passphrase does not open the key", where=where) from None
            raise BadInput("the private key is damaged", where=where, hint=_MAKE) from None
        if not isinstance(private, ed25519.Ed25519PrivateKey):
            raise BadInput("a private key of another kind than Ed25519", where=where, hint=_MAKE)
        return cls(_public(private), private)

    @classmethod
    def generate(cls, path: Path, *, comment: str = "", passphrase: bytes | None = None) -> Self:
        """Makes a new key: the private part into `path` (mode 0600), the public line into `path`.pub.

        Raises BadInput where either exists: a key is never overwritten.
        """
        ed25519 = load_ed25519()
        from cryptography.hazmat.primitives import serialization

        check_comment(comment)
        public_path = path.with_name(f"{path.name}.pub")
        private = ed25519.Ed25519PrivateKey.generate()
        lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
        public = _public(private, comment)
        with disk_errors(path):
            for taken in (path, public_path):
                if os.path.lexists(taken):
                    raise _taken(taken)
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, pem, 0o600)
            try:
                _create(public_path, f"{public.line}\n".encode(), 0o644)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return cls(public, private)

    def sign(self, record: Record) -> Signature:
        """Signs a version. Ed25519 needs no randomness: the same version gets the same signature again."""
        value = base64.b64encode(self._private.sign(statement(record))).decode()
        return Signature(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), self.public.key, value)


_MAKE = "`xpert registry keygen -o FILE` makes one"


def signing_key_path(given: Path | None) -> Path:
    """The file of the key to sign with: `given`, or `$XPERT_SIGNING_KEY`; raises BadInput where neither is set."""
    named = given or os.environ.get(ENVIRONMENT)
    if not named:
        raise BadInput("no key to sign with is given", hint=f"name its file, or set ${ENVIRONMENT}; {_MAKE}")
    return Path(named).expanduser()


def passphrase_from(path: Path | None) -> Passphrase:
    """A source that reads the first line of a file, when it is asked; without a file it has nothing."""

    def read() -> bytes | None:
        if path is None:
            return None
        data, mode = _read_small(path)
        if mode is not None and mode & 0o077:
            raise BadInput("others may read this passphrase", where=str(path), hint=f"`chmod 600 {path}`")
        line = data.split(b"\n", 1)[0].rstrip(b"\r")
        if not line:
            raise BadInput("the passphrase is empty", where=str(path), hint="put it on the file's first line")
        return line

    return read


def check_comment(text: str, *, where: str | None = None) -> str:
    """A comment is one short line of text: it is shown in terminals."""
    if _COMMENT.fullmatch(text) is None:
        raise BadInput("a key's comment is one line of at most 128 printable characters", where=where)
    return text


def _public(private: Ed25519PrivateKey, comment: str = "") -> PublicKey:
    return PublicKey(base64.b64encode(private.public_key().public_bytes_raw()).decode(), comment)


def _read_small(path: Path) -> tuple[bytes, int | None]:
    """Content and permissions of a small file (None for a pipe); one descriptor, so that both are of one file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as stream:
            status = os.fstat(stream.fileno())
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise BadInput("a folder, not a key", where=str(path)) from None
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=str(path)) from None
    if len(data) > _MOST_BYTES:
        raise BadInput(f"more than {_MOST_BYTES:,} bytes, which no key has", where=str(path))
    return data, stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise _taken(path) from None
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _taken(path: Path) -> BadInput:
    return BadInput("exists already, and a key is never overwritten", where=str(path), hint="choose another -o")
