"""Whose signature counts for which name: the rules as a table, and the list's file and commands."""

from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.registry.signing.keys import PublicKey, SigningKey
from xpert.registry.signing.trust import TrustEntry, TrustList, edit_trust, trust_path
from xpert.registry.versions import Record, StoredFile, Version, content_digest

Run = Callable[..., Result]
NAMES = ("ann", "bob", "eve")


def make_record(name: str) -> Record:
    files = (StoredFile("expert.json", 3, "a" * 64),)
    return Record(Version(name, 1, "expert", content_digest(files), "2026-01-01T00:00:00Z", 3), files)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SigningKey]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: SigningKey.generate(folder / name, comment=name) for name in NAMES}


# (trusted keys as pattern=who, required patterns, the version's name, who signed) -> whether it may be used, whose
# signature counted, and words of the reason
RULES: list[tuple[str, str, str, str, bool, str, str]] = [
    ("", "", "acme/a", "", True, "", "unsigned; nothing demands"),
    ("", "", "acme/a", "eve", True, "", "not trusted for it; nothing demands"),
    # an owner with a key must sign with one of its keys
    ("acme=ann", "", "acme/a", "ann", True, "ann", "signed by ann, trusted"),
    ("acme=ann", "", "acme/a", "", False, "", "unsigned, but must be signed by a key of acme"),
    ("acme=ann", "", "acme/a", "eve", False, "", "but must be signed by a key of acme"),
    ("acme=ann", "", "acme/a", "eve bob ann", True, "ann", "signed by ann"),
    ("acme=ann acme=bob", "", "acme/a", "bob", True, "bob", "signed by bob"),
    ("acme=ann", "", "beta/a", "", True, "", "nothing demands"),
    ("acme=ann", "", "beta/a", "ann", True, "", "not trusted for it"),
    ("acme=ann beta=bob", "", "beta/a", "ann", False, "", "a key of beta"),
    ("acme=ann", "", "acme2/a", "", True, "", "nothing demands"),
    ("acme=ann", "", "beta/acme", "", True, "", "nothing demands"),
    # the more specific pattern alone decides
    ("acme/a=bob acme=ann", "", "acme/a", "ann", False, "", "a key of acme/a"),
    ("acme/a=bob acme=ann", "", "acme/a", "bob", True, "bob", "signed by bob"),
    ("acme/a=bob acme=ann", "", "acme/b", "bob", False, "", "a key of acme"),
    ("acme/a=bob acme=ann", "", "acme/b", "ann", True, "ann", "signed by ann"),
    ("acme/a=bob", "", "acme/b", "", True, "", "nothing demands"),
    ("*=eve acme=ann", "", "acme/a", "eve", False, "", "a key of acme"),
    # a key of * speaks for owners without a key, and demands nothing
    ("*=eve acme=ann", "", "beta/a", "eve", True, "eve", "signed by eve"),
    ("*=eve", "", "beta/a", "", True, "", "nothing demands"),
    # what is required must be signed by a key that speaks for it
    ("", "*", "acme/a", "", False, "", "no key is trusted for it"),
    ("", "*", "acme/a", "eve", False, "", "no key is trusted for it"),
    ("*=eve", "acme", "acme/a", "", False, "", "must be signed by a trusted key"),
    ("*=eve", "acme", "acme/a", "eve", True, "eve", "signed by eve"),
    ("*=eve", "acme", "beta/a", "", True, "", "nothing demands"),
    ("beta=bob", "*", "acme/a", "bob", False, "", "no key is trusted for it"),
    ("beta=bob", "acme/a", "acme/b", "", True, "", "nothing demands"),
    ("beta=bob", "acme/a", "acme/a", "", False, "", "no key is trusted for it"),
    # case does not help
    ("acme=ann", "", "ACME/a", "", False, "", "a key of ACME"),
    ("ACME/A=ann", "", "acme/a", "ann", True, "ann", "signed by ann"),
    ("", "Acme", "aCME/a", "", False, "", "no key is trusted for it"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " | ".join(rule[:4]))
def test_rules(rule: tuple[str, str, str, str, bool, str, str], keys: dict[str, SigningKey]) -> None:
    trusted, required, name, signers, ok, by, said = rule
    known = TrustList(required=tuple(required.split()))
    for part in trusted.split():
        pattern, _, who = part.partition("=")
        known = known.with_key(PublicKey(keys[who].public.key, who), pattern)
    record = make_record(name)
    signatures = [keys[who].sign(record) for who in signers.split()]
    verdict = known.judge(record, signatures)
    assert (verdict.ok, verdict.by) == (ok, keys[by].public.key if by else None)
    assert said in verdict.reason
    demanded = known.judge(record, signatures, required=True)
    assert demanded.ok == bool(by)
    if ok:
        known.enforce(record, signatures)
    else:
        with pytest.raises(BadInput, match="refused by the trust list"):
            known.enforce(record, signatures)


def test_a_signature_that_does_not_verify_is_refused_whoever_made_it(keys: dict[str, SigningKey]) -> None:
    record = make_record("acme/a")
    good = keys["ann"].sign(record)
    stolen = keys["eve"].sign(make_record("acme/b"))
    claimed = dataclasses.replace(keys["eve"].sign(record), key=keys["ann"].public.key)
    for known in (TrustList(), TrustList().with_key(keys["ann"].public, "acme")):
        for bad in (stolen, claimed):
            with pytest.raises(Corrupt, match="does not match this version"):
                known.judge(record, [good, bad])


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = base64.b64encode(bytes(32)).decode()
ENTRY = {"for": "acme", "key": KEY, "comment": "", "added": ""}
LIST = {"kind": "trust", "schema": 1, "keys": [ENTRY], "required": []}
SPOILT: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "no list": ("[]", "not a trust list"),
    "newer": (json.dumps(LIST | {"schema": 2}), "newer xpert"),
    "misspelt demand": (json.dumps({k: v for k, v in LIST.items() if k != "required"} | {"require": ["*"]}), "damaged"),
    "odd pattern": (json.dumps(LIST | {"keys": [ENTRY | {"for": "ac*"}]}), "covers no names"),
    "odd demand": (json.dumps(LIST | {"required": ["acme/*"]}), "covers no names"),
    "demand is no text": (json.dumps(LIST | {"required": [5]}), "covers no names"),
    "odd key": (json.dumps(LIST | {"keys": [ENTRY | {"key": KEY[:-4]}]}), "no Ed25519 key"),
    "odd field": (json.dumps(LIST | {"keys": [ENTRY | {"expires": "never"}]}), "damaged"),
    "a key twice": ('{"kind": "trust", "schema": 1, "keys": [], "required": ["*"], "required": []}', "stands twice"),
    "huge": (json.dumps(LIST) + " " * (5 << 20), "no trust list has"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_list_half_understood_is_refused(case: str, tmp_path: Path) -> None:
    text, said = SPOILT[case]
    (tmp_path / "trust.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        TrustList.read(tmp_path / "trust.json")


def test_the_file(tmp_path: Path, keys: dict[str, SigningKey], monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrustList.read() == TrustList()
    made = edit_trust(lambda known: known.with_key(keys["ann"].public, "acme").requiring("*"))
    assert TrustList.read() == made and made.named(keys["ann"].public.key) == "ann"
    assert edit_trust(lambda known: known.with_key(keys["ann"].public, "ACME")).entries[0].pattern == "ACME"
    assert len(TrustList.read().entries) == 1
    monkeypatch.setenv("XPERT_TRUST", str(tmp_path / "other" / "trust.json"))
    with pytest.raises(NotFound, match="no such trust list"):
        TrustList.read()  # a mistyped path must not mean that nothing is demanded
    edit_trust(lambda known: known.requiring("beta"))
    assert TrustList.read().required == ("beta",) and trust_path().parent == tmp_path / "other"


def test_two_who_change_it_at_once(keys: dict[str, SigningKey]) -> None:
    code = (
        "import sys\nfrom xpert.registry.signing.trust import edit_trust\n"
        "for n in range(10): edit_trust(lambda known: known.requiring(f'{sys.argv[1]}-{n}'))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, who]) for who in ("a", "b", "c")]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(TrustList.read().required) == 30


def test_keys_leave_by_their_fingerprint(keys: dict[str, SigningKey]) -> None:
    known = TrustList()
    for pattern in ("acme", "acme/a"):
        known = known.with_key(keys["ann"].public, pattern)
    known = known.with_key(keys["bob"].public, "acme")
    name = keys["ann"].public.fingerprint
    left, gone = known.without_key(name[:8], "acme/a")
    assert [e.pattern for e in gone] == ["acme/a"] and len(left.entries) == 2
    rest, gone = known.without_key(name.upper())
    assert len(gone) == 2 and [e.key for e in rest.entries] == [keys["bob"].public.key]
    absent: list[tuple[str, str | None]] = [(name[:7], None), (name, "beta"), ("0" * 24, None)]
    for text, only in absent:
        with pytest.raises(NotFound, match="no trusted key"):
            known.without_key(text, only)


def test_the_commands(xpert: Run, tmp_path: Path) -> None:
    xpert("registry", "keygen", "-o", tmp_path / "key", "--comment", "ACME")
    added = xpert("registry", "trust", "add", tmp_path / "key.pub", "--owner", "acme", "--json")
    name = json.loads(added.stdout)["fingerprint"]
    xpert("registry", "trust", "require", "beta")
    listed = xpert("registry", "trust", "list")
    assert "ACME" in listed.stdout and name in listed.stdout and "must be signed: beta" in listed.stdout
    shown = json.loads(xpert("registry", "trust", "list", "--json").stdout)
    assert shown["required"] == ["beta"] and shown["keys"][0]["for"] == "acme"
    removed = xpert("registry", "trust", "remove", name)
    assert "unsigned versions of acme are accepted again" in removed.stdout
    assert "need not" in xpert("registry", "trust", "require", "beta", "--drop").stdout
    assert TrustList.read() == TrustList()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a private key": (["add", "{key}", "--owner", "acme"], "a private key. The public one is beside it: key.pub"),
    "no file": (["add", "nowhere.pub", "--owner", "acme"], "no such file"),
    "no owner": (["add", "{key}.pub"], "--owner"),
    "odd owner": (["add", "{key}.pub", "--owner", "a/b/c"], "covers no names"),
    "odd owner to remove": (["remove", "0" * 24, "--owner", "a b"], "covers no names"),
    "no such key": (["remove", "0" * 24], "no trusted key"),
    "not demanded": (["require", "acme", "--drop"], "no signature is required"),
    "odd demand": (["require", "acme/"], "covers no names"),
    "misspelt": (["lst"], "list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, xpert: Run, tmp_path: Path) -> None:
    SigningKey.generate(tmp_path / "key")
    arguments, said = MISTAKES[mistake]
    result = xpert("registry", "trust", *(argument.format(key=tmp_path / "key") for argument in arguments))
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == "" and not trust_path().exists()


def test_an_entry_is_checked() -> None:
    with pytest.raises(BadInput, match="one line"):
        TrustEntry("acme", KEY, "\x1b[31m")
