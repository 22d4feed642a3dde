"""Signatures in a registry: signing, pulling under a trust list, and what verify and show say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xpert.errors import BadInput, Corrupt
from xpert.registry.documents import DocumentName
from xpert.registry.signing.keys import SigningKey
from xpert.registry.signing.signatures import SignatureList, verify
from xpert.registry.signing.trust import edit_trust
from xpert.registry.store import Registry
from xpert.registry.versions import Record

Maker = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.generate(tmp_path / "key", comment="ann")


def trust(key: SigningKey, pattern: str) -> None:
    edit_trust(lambda known: known.with_key(key.public, pattern))


def list_document(number: int = 1) -> DocumentName:
    return DocumentName("acme/a", "signatures", number)


def write_list(registry: Registry, made: SignatureList) -> None:
    registry.records.replace(DocumentName(made.name, "signatures", made.version), made.to_bytes())


def test_signing_and_pulling(registry: Registry, expert: Maker, key: SigningKey, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    trust(key, "acme")
    with pytest.raises(BadInput, match="unsigned, but must be signed by a key of acme"):
        registry.pull("acme/a")
    assert registry.sign("acme/a", key).ref == "acme/a@1"
    assert (registry.pull("acme/a") / "expert.json").is_file()
    before = registry.records.read_bytes(list_document())
    registry.sign("acme/a@1", key)
    assert registry.records.read_bytes(list_document()) == before
    other = SigningKey.generate(tmp_path / "other")
    registry.sign("acme/a", other)
    (first, second) = registry.signatures_of(registry.record("acme/a"))
    assert {first.key, second.key} == {key.public.key, other.public.key}
    assert registry.records.read_signatures("acme/a", 1).revision == 2
    assert registry.pull("acme/a").is_dir() and not registry.verify()


def test_what_is_cached_is_not_let_through_either(registry: Registry, expert: Maker, key: SigningKey) -> None:
    registry.publish(expert(), "acme/a")
    registry.pull("acme/a")
    trust(key, "acme")
    with pytest.raises(BadInput, match="refused by the trust list"):
        registry.pull("acme/a")


def test_required_signatures(registry: Registry, expert: Maker, key: SigningKey, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    registry.pull("acme/a")
    for signed in (False, True):
        if signed:
            registry.sign("acme/a", key)  # a key that is not trusted is as good as none
        with pytest.raises(BadInput, match="no key is trusted for it"):
            registry.pull("acme/a", tmp_path / "out", require_signature=True)
    assert not (tmp_path / "out").exists()
    trust(key, "*")
    registry.pull("acme/a", tmp_path / "out", require_signature=True)


def test_a_signature_of_another_version_is_refused(registry: Registry, expert: Maker, key: SigningKey) -> None:
    registry.publish(expert("one", seed=1), "acme/a")
    registry.publish(expert("two", seed=2), "acme/a")
    registry.sign("acme/a@1", key)
    stolen = registry.signatures_of(registry.record("acme/a@1"))
    write_list(registry, SignatureList("acme/a", 2, tuple(stolen), 1))
    with pytest.raises(Corrupt, match="does not match this version"):
        registry.pull("acme/a@2")
    assert registry.pull("acme/a@1").is_dir()
    (problem,) = registry.verify()
    assert problem.where == "acme/a@2.signatures.json" and "does not match the version" in problem.what
    (refused,) = registry.refused()
    assert refused.where == "acme/a@2"


def test_a_record_exchanged_under_its_signature(registry: Registry, expert: Maker, key: SigningKey) -> None:
    """Who controls the place can write a sound record of other content; the signature does not fit it."""
    registry.publish(expert("one", seed=1), "acme/a")
    registry.sign("acme/a", key)
    registry.publish(expert("two", seed=2), "evil/b")
    record = registry.record("evil/b")
    changed = {**record.to_dict(), "name": "acme/a"}
    changed.pop("checksum")
    forged = Record.from_dict(changed, where="x")
    registry.records.replace(forged.document, forged.to_bytes())
    (registry.folder / "index.sqlite").unlink()
    with pytest.raises(Corrupt, match="does not match this version"):
        registry.pull("acme/a")


def test_a_list_that_was_taken_away(registry: Registry, expert: Maker, key: SigningKey) -> None:
    registry.publish(expert(), "acme/a")
    registry.sign("acme/a", key)
    trust(key, "acme")
    registry.records.path(list_document()).unlink()
    with pytest.raises(BadInput, match="unsigned, but must be signed"):
        registry.pull("acme/a")
    rebuilt = registry.rebuild()
    assert rebuilt.restored == ("acme/a@1.signatures.json",)
    assert registry.pull("acme/a").is_dir()


def test_rebuilt_from_the_blobs_alone(registry: Registry, expert: Maker, key: SigningKey, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    registry.sign("acme/a", key)
    registry.sign("acme/a", SigningKey.generate(tmp_path / "other"))
    made = registry.records.read_signatures("acme/a", 1)
    shutil.rmtree(registry.folder / "records")
    (registry.folder / "index.sqlite").unlink()
    registry.rebuild()
    assert registry.records.read_signatures("acme/a", 1) == made  # of two revisions the later one
    assert all(verify(signature, registry.record("acme/a")) for signature in made.signatures)
    assert registry.gc().files == 1  # the first revision
    assert not registry.verify()


def test_a_damaged_list(registry: Registry, expert: Maker, key: SigningKey) -> None:
    registry.publish(expert(), "acme/a")
    registry.sign("acme/a", key)
    path = registry.records.path(list_document())
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"revision": 1', '"revision": 2'))
    with pytest.raises(Corrupt, match="checksum"):
        registry.pull("acme/a")
    assert any(problem.where == "acme/a@1.signatures.json" for problem in registry.verify())
    registry.rebuild()
    assert registry.pull("acme/a").is_dir() and not registry.verify()


def test_a_removed_version_loses_its_signatures(registry: Registry, expert: Maker, key: SigningKey) -> None:
    registry.publish(expert(), "acme/a")
    registry.sign("acme/a", key)
    registry.remove("acme/a@1")
    assert not registry.records.path(list_document()).exists()
    registry.gc()
    registry.rebuild()
    assert not registry.verify() and not registry.refused()


def test_old_registries_can_be_signed(key: SigningKey, tmp_path: Path) -> None:
    """A record of the first schema keeps the checksum it has, which the signature binds."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "version-1", tmp_path / "old")
    registry = Registry(tmp_path / "old")
    registry.sign("acme/sums@1", key)
    record = registry.record("acme/sums@1")
    assert record.checksum == json.loads(registry.records.record_path("acme/sums", 1).read_bytes())["checksum"]
    assert record.to_bytes() == registry.records.record_path("acme/sums", 1).read_bytes()
    trust(key, "acme/sums")
    assert registry.pull("acme/sums@1").is_dir()


def test_many_sign_at_once(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    registry.publish(expert(), "acme/a")
    keys = [SigningKey.generate(tmp_path / f"key-{n}") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: Registry(registry.folder).sign("acme/a", one), keys))
    assert {s.key for s in registry.signatures_of(registry.record("acme/a"))} == {one.public.key for one in keys}


# ── as a user ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_commands(xpert: Run, expert: Maker, key: SigningKey, tmp_path: Path) -> None:
    made = xpert("registry", "publish", expert(), "--name", "acme/a", "--sign", tmp_path / "key")
    assert made.stdout == f"published acme/a@1, signed by {key.public.fingerprint}\n", made.stderr
    shown = xpert("registry", "show", "acme/a").stdout
    assert f"{key.public.fingerprint}, not trusted for it" in shown and "nothing demands a trusted signature" in shown
    xpert("registry", "trust", "add", tmp_path / "key.pub", "--owner", "acme")
    shown = xpert("registry", "show", "acme/a").stdout
    assert f"ann ({key.public.fingerprint}), trusted" in shown and "signed by ann, trusted" in shown
    value = json.loads(xpert("registry", "show", "acme/a", "--json").stdout)
    assert value["trust"]["ok"] is True and value["signatures"][0]["trusted"] is True
    assert xpert("registry", "pull", "acme/a", "--require-signature").exit_code == 0
    xpert("registry", "publish", expert("b", seed=1), "--name", "acme/b")
    refused = xpert("registry", "pull", "acme/b")
    assert refused.exit_code == 2 and refused.stderr.startswith(
        "xpert: acme/b@1: refused by the trust list: it is unsig"
    )
    assert "not to be pulled: unsigned, but must be" in xpert("registry", "show", "acme/b").stdout
    checked = xpert("registry", "verify")
    assert checked.exit_code == 0 and checked.stdout.startswith("all is sound\n")
    assert "not to be pulled, by your trust list:\n  acme/b@1: unsigned" in checked.stdout
    signed = xpert("registry", "sign", "acme/b", "--key", tmp_path / "key")
    assert signed.exit_code == 0 and xpert("registry", "pull", "acme/b").exit_code == 0
    assert xpert("registry", "verify").stdout == "all is sound\n"


def test_the_key_of_the_environment(
    xpert: Run, expert: Maker, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPERT_SIGNING_KEY", str(tmp_path / "key"))
    assert "signed by" in xpert("registry", "publish", expert(), "--name", "acme/a").stdout
    assert xpert("registry", "sign", "acme/a").exit_code == 0
    monkeypatch.setenv("XPERT_SIGNING_KEY", str(tmp_path / "nowhere"))
    failed = xpert("registry", "publish", expert("b", seed=1), "--name", "acme/b")
    assert failed.exit_code == 2 and "no such file" in failed.stderr
    assert xpert("registry", "show", "acme/b").exit_code == 2  # nothing is published that could not be signed


def test_mixtures_are_held_to_it_too(xpert: Run, expert: Maker, key: SigningKey) -> None:
    xpert("registry", "publish", expert(), "--name", "acme/a")
    trust(key, "acme")
    from xpert.experts.mixture import open_expert
    from xpert.experts.mixture_file import load_mixture

    for act in (lambda: load_mixture("acme/a"), lambda: open_expert("acme/a", Registry())):
        with pytest.raises(BadInput, match="refused by the trust list"):
            act()


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no key": (["sign", "acme/a"], 2, "no key to sign with"),
    "the public key": (["sign", "acme/a", "--key", "{key}.pub"], 2, "others may read|the file without .pub"),
    "no such key": (["sign", "acme/a", "--key", "nowhere"], 2, "no such file"),
    "no such version": (["sign", "acme/a@9", "--key", "{key}"], 2, "no version 9"),
    "no such name": (["sign", "acme/aa", "--key", "{key}"], 2, "Did you mean 'acme/a'?"),
    "a lost trust list": (["pull", "acme/a"], 2, "no such trust list"),
    "a damaged trust list": (["pull", "acme/a"], 2, "not valid JSON"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str, xpert: Run, expert: Maker, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert xpert("registry", "publish", expert(), "--name", "acme/a").exit_code == 0
    if "trust list" in mistake:
        monkeypatch.setenv("XPERT_TRUST", str(tmp_path / "trust.json"))
        if "damaged" in mistake:
            (tmp_path / "trust.json").write_text("{")
    arguments, status, said = MISTAKES[mistake]
    result = xpert("registry", *(argument.format(key=tmp_path / "key") for argument in arguments))
    assert result.exit_code == status and any(words in result.stderr for words in said.split("|")), result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_no_registry_goes_round_the_trust_list() -> None:
    """Whatever kind a registry is, `pull` is the one way out: subclasses take out, but do not decide."""
    import xpert.registry.opening  # noqa: F401  # knows all kinds

    kinds = [Registry]
    for kind in kinds:  # grows while it is walked
        kinds += kind.__subclasses__()
    assert not [kind for kind in kinds[1:] if "pull" in vars(kind)]
