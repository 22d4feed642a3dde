"""What a signature binds, what a list of them holds, and which files are keys."""

from __future__ import annotations

import base64
import dataclasses
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput, Corrupt, Unavailable, XpertError
from xpert.registry.signing.keys import PublicKey, SigningKey, passphrase_from
from xpert.registry.signing.signatures import MOST_SIGNATURES, Signature, SignatureList, decode, statement, verify
from xpert.registry.versions import Record, StoredFile, Version, content_digest

Run = Callable[..., Result]


def make_record(name: str = "acme/sums", number: int = 1, *, content: str = "a") -> Record:
    files = (StoredFile("expert.json", 3, content * 64),)
    version = Version(name, number, "expert", content_digest(files), "2026-01-01T00:00:00Z", 3)
    return Record(version, files)


def made(number: int, *, signed: str = "2026-01-01T00:00:00Z") -> Signature:
    """A well-formed signature that signs nothing."""
    key, value = number.to_bytes(32, "big"), number.to_bytes(64, "big")
    return Signature(signed, base64.b64encode(key).decode(), base64.b64encode(value).decode())


# ── what is bound ────────────────────────────────────────────────────────────────────────────────────────────────

OTHERS: dict[str, Record] = {
    "another name": make_record("acme/sum"),
    "another number": make_record(number=2),
    "another content": make_record(content="b"),
    "another kind": dataclasses.replace(
        make_record(), version=dataclasses.replace(make_record().version, kind="mixture")
    ),
    "another description": dataclasses.replace(
        make_record(), version=dataclasses.replace(make_record().version, description="better than it is")
    ),
    "another size": dataclasses.replace(make_record(), version=dataclasses.replace(make_record().version, size=4)),
}


def test_a_signature_holds_for_its_version(tmp_path: Path) -> None:
    key = SigningKey.generate(tmp_path / "key")
    signature = key.sign(make_record())
    assert verify(signature, make_record())
    assert verify(SigningKey.load(tmp_path / "key").sign(make_record()), make_record())
    assert signature.key == PublicKey.read(tmp_path / "key.pub").key


@pytest.mark.parametrize("other", OTHERS)
def test_a_signature_fits_no_other_version(other: str, tmp_path: Path) -> None:
    signature = SigningKey.generate(tmp_path / "key").sign(make_record())
    assert not verify(signature, OTHERS[other])
    assert statement(make_record()) != statement(OTHERS[other])


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    signature = SigningKey.generate(tmp_path / "key").sign(make_record())
    other = SigningKey.generate(tmp_path / "other").public.key
    assert not verify(dataclasses.replace(signature, key=other), make_record())
    raw = bytearray(base64.b64decode(signature.signature))
    for position in (0, 31, 32, 63):
        raw[position] ^= 1
        changed = dataclasses.replace(signature, signature=base64.b64encode(raw).decode())
        assert not verify(changed, make_record())
        raw[position] ^= 1


def test_a_known_signature_still_holds() -> None:
    """A signature as it was made once: what is signed may never change."""
    record = make_record()
    said = statement(record).decode()
    assert said == (
        f'{{"checksum":"{record.to_dict()["checksum"]}","digest":"{record.version.digest}","kind":"expert",'
        '"name":"acme/sums","schema":1,"version":1,"what":"xpert version"}'
    )


@pytest.mark.parametrize(
    "text",
    ["", "AA==", "A" * 44, "A" * 43 + "=\n", " " + "A" * 43 + "=", "A" * 42 + "B=", "é" * 44, None, 5, "A" * 9_000],
)
def test_only_canonical_base64_of_the_right_size(text: object) -> None:
    assert decode(text, 32) is None
    assert decode("A" * 43 + "=", 32) == bytes(32)


# ── lists ────────────────────────────────────────────────────────────────────────────────────────────────────────

_TIMES = st.integers(1, 28).map(lambda day: f"2026-01-{day:02}T00:00:00Z")
_SIGNATURES = st.lists(st.builds(made, st.integers(0, 6), signed=_TIMES), max_size=5)


def a_list(signatures: list[Signature], revision: int) -> SignatureList:
    bare = SignatureList("acme/sums", 1)
    return dataclasses.replace(bare.merged(dataclasses.replace(bare, signatures=tuple(signatures))), revision=revision)


@given(_SIGNATURES, _SIGNATURES, st.integers(0, 3), st.integers(0, 3))
def test_merging_is_a_union(left: list[Signature], right: list[Signature], one: int, two: int) -> None:
    a, b = a_list(left, one), a_list(right, two)
    both = a.merged(b)
    assert both == b.merged(a)
    assert {s.key for s in both.signatures} == {s.key for s in left + right}
    assert len(both.signatures) == len({s.key for s in left + right})
    for key in {s.key for s in both.signatures}:
        assert next(s.signed for s in both.signatures if s.key == key) == min(
            s.signed for s in left + right if s.key == key
        )
    assert a.merged(a) == a and both.merged(both) == both
    for part in (a, b):  # whoever holds an older list sees by the revision that there is a newer one
        assert both.revision >= part.revision
        assert both.signatures == part.signatures or both.revision > part.revision


@given(_SIGNATURES, st.integers(0, 9))
def test_a_list_survives_its_document(signatures: list[Signature], revision: int) -> None:
    whole = a_list(signatures, revision)
    assert SignatureList.from_dict(whole.to_dict(), where="x") == whole


def test_lists_are_bounded() -> None:
    many = a_list([made(n) for n in range(MOST_SIGNATURES)], 1)
    with pytest.raises(BadInput, match="more than 64"):
        many.merged(a_list([made(99)], 1))


def _spoilt(**changes: object) -> dict[str, object]:
    from xpert.storage import hash_json

    value = {k: v for k, v in a_list([made(1)], 1).to_dict().items() if k != "checksum"} | changes
    return value | {"checksum": hash_json(value)}


SPOILT: dict[str, tuple[object, str]] = {
    "no object": ([], "not a list of signatures"),
    "another kind": (_spoilt(kind="tag"), "not a list of signatures"),
    "a newer one": (_spoilt(schema=3), "newer xpert"),
    "changed": (_spoilt() | {"revision": 7}, "do not match their checksum"),
    "no list": (_spoilt(signatures={}), "damaged"),
    "too many": (_spoilt(signatures=[{}] * 65), "at most 64"),
    "an odd entry": (_spoilt(signatures=[{"key": "x"}]), "damaged"),
    "a short key": (_spoilt(signatures=[dataclasses.asdict(made(1)) | {"key": "AAAA"}]), "no sound key"),
    "an odd time": (_spoilt(signatures=[dataclasses.asdict(made(1)) | {"signed": "\x1b[2J"}]), "no sound time"),
    "an odd name": (_spoilt(name="../x"), "not a name"),
    "an odd number": (_spoilt(version="1"), "numbers"),
    "more than it has": (_spoilt(evil=True), "damaged"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_damaged_lists(case: str) -> None:
    value, said = SPOILT[case]
    with pytest.raises((Corrupt, BadInput), match=said):
        SignatureList.from_dict(value, where="x")


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_private_and_never_overwritten(xpert: Run, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        result = xpert("registry", "keygen", "-o", tmp_path / "new" / "key", "--comment", "ACME release")
    finally:
        os.umask(previous)
    assert result.exit_code == 0, result.stderr
    key, public = tmp_path / "new" / "key", tmp_path / "new" / "key.pub"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert public.read_text() == f"xpert-ed25519 {SigningKey.load(key).public.key} ACME release\n"
    assert PublicKey.read(public).fingerprint in result.stdout
    assert "PRIVATE" not in result.stdout and key.read_text().splitlines()[1] not in result.stdout
    before = key.read_bytes()
    for gone, said in ((None, "key: exists already"), (key, "key.pub: exists already")):
        if gone:
            gone.unlink()
        again = xpert("registry", "keygen", "-o", key)
        assert again.exit_code == 2 and said in again.stderr
    assert not key.exists() and before  # with the public part there, no private one is made


def test_an_encrypted_key(xpert: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("open sesame\nsecond line\n")
    secret.chmod(0o600)
    assert xpert("registry", "keygen", "-o", tmp_path / "key", "--passphrase-file", secret).exit_code == 0
    assert "ENCRYPTED" in (tmp_path / "key").read_text()
    loaded = SigningKey.load(tmp_path / "key", lambda: b"open sesame")
    assert verify(loaded.sign(make_record()), make_record())
    assert "PRIVATE" not in repr(loaded) and loaded.public.fingerprint in repr(loaded)


def _pem(kind: str) -> bytes:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, x25519

    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else x25519.X25519PrivateKey.generate()
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


# what the key file becomes -> the sentence
BAD_KEYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda p: p.unlink(), "no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "a folder"),
    "others read it": (lambda p: p.chmod(0o640), "others may read"),
    "all read it": (lambda p: p.chmod(0o604), "others may read"),
    "elliptic curve": (lambda p: p.write_bytes(_pem("ec")), "another kind than Ed25519"),
    "for key exchange": (lambda p: p.write_bytes(_pem("x25519")), "another kind than Ed25519"),
    "the public one": (lambda p: (p.chmod(0o644), p.write_text("xpert-ed25519 AAAA\n")), "the file without .pub"),
    "empty": (lambda p: p.write_text(""), "not a private key"),
    "cut short": (lambda p: p.write_text(p.read_text()[:60]), "is damaged"),
    "garbled": (lambda p: p.write_text(p.read_text().replace("MC4C", "AAAA")), "is damaged"),
    "huge": (lambda p: os.truncate(p, 1 << 40), "no key has"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_files_that_are_no_keys(case: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    SigningKey.generate(key)
    act, said = BAD_KEYS[case]
    act(key)
    with pytest.raises(BadInput, match=said) as caught:
        SigningKey.load(key)
    assert str(key) in str(caught.value)


def test_passphrases(tmp_path: Path) -> None:
    SigningKey.generate(tmp_path / "key", passphrase=b"x")
    with pytest.raises(BadInput, match="is encrypted"):
        SigningKey.load(tmp_path / "key")
    with pytest.raises(BadInput, match="does not open"):
        SigningKey.load(tmp_path / "key", lambda: b"y")
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    with pytest.raises(BadInput, match="others may read this passphrase"):
        SigningKey.load(tmp_path / "key", passphrase_from(secret))
    secret.chmod(0o600)
    SigningKey.load(tmp_path / "key", passphrase_from(secret))
    secret.write_text("\n")
    with pytest.raises(BadInput, match="passphrase is empty"):
        SigningKey.load(tmp_path / "key", passphrase_from(secret))


BAD_PUBLIC: dict[str, str] = {
    "a private key": "-----BEGIN PRIVATE KEY-----\n",
    "two lines": f"xpert-ed25519 {'A' * 43}=\nxpert-ed25519 {'A' * 43}=\n",
    "another program's": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFh0 me\n",
    "a short key": "xpert-ed25519 AAAA me\n",
    "escapes in its comment": f"xpert-ed25519 {'A' * 43}= \x1b[2Jme\n",
    "a long comment": f"xpert-ed25519 {'A' * 43}= {'x' * 129}\n",
    "empty": "",
}


@pytest.mark.parametrize("case", BAD_PUBLIC)
def test_files_that_are_no_public_keys(case: str, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(BAD_PUBLIC[case])
    with pytest.raises(BadInput, match=r"a private key|not a public key|one line of at most"):
        PublicKey.read(tmp_path / "key.pub")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = SigningKey.generate(tmp_path / "key").sign(make_record())
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    for act in (
        lambda: SigningKey.load(tmp_path / "key"),
        lambda: SigningKey.generate(tmp_path / "other"),
        lambda: verify(signature, make_record()),
    ):
        with pytest.raises(XpertError, match=r"cryptography.*Run: pip install 'xpert-toolkit\[sign\]'") as caught:
            act()
        assert isinstance(caught.value, Unavailable)
    assert not (tmp_path / "other").exists()
