"""Versions copied from registry to registry, of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.registry.places.places import s3_bucket as s3_bucket
from tests.registry.places.places import s3_server as s3_server
from xpert.errors import BadInput, Corrupt
from xpert.registry import mirror
from xpert.registry.copying import copy_versions
from xpert.registry.opening import open_registry
from xpert.registry.signing.keys import SigningKey
from xpert.registry.store import Registry
from xpert.storage import hash_file

Run = Callable[..., Result]
Maker = Callable[..., Path]


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FRESH_SECONDS", 0.0)


@pytest.fixture
def filled(registry: Registry, expert: Maker, tmp_path: Path) -> Registry:
    """acme/sums 1 and 2 (1 is `stable`), acme/rhymes 1, and acme/both, a mixture of sums@1 and rhymes@1."""
    for seed, name in ((1, "acme/sums"), (2, "acme/sums"), (3, "acme/rhymes")):
        registry.publish(expert(f"e{seed}", seed=seed), name)
    registry.tag("acme/sums@1", "stable")
    made = tmp_path / "m.json"
    made.write_text(json.dumps({"kind": "mixture", "experts": [{"ref": "acme/sums@1"}, {"ref": "acme/rhymes@1"}]}))
    registry.publish(made, "acme/both")
    return registry


def records(registry: Registry) -> dict[str, bytes]:
    return {str(d): registry.records.read_bytes(d) for d in registry.records.documents() if d.kind == "record"}


def test_from_place_to_place(filled: Registry, s3_bucket: str, tmp_path: Path) -> None:
    """Folder, S3, S3, memory, folder: what arrives is what was published, record for record."""
    chain = [f"{s3_bucket}/one", f"{s3_bucket}/two", f"memory://{tmp_path.name}/three", str(tmp_path / "four")]
    source = filled
    for location in chain:
        target = open_registry(location)
        copied = copy_versions(source, target, ["acme/both", "acme/sums"], every=True, tags=True)
        assert [(one.ref, one.new) for one in copied] == [
            (ref, True) for ref in ("acme/sums@1", "acme/rhymes@1", "acme/both@1", "acme/sums@2")
        ]
        assert copied[0].tags == ("stable",)
        again = copy_versions(source, target, ["acme/both"], tags=True)
        assert not any(one.new or one.tags for one in again) and len(again) == 3
        assert list(target.verify()) == [] and dict(target.tags("acme/sums")) == {"stable": 1, "latest": 2}
        source = target
    assert type(source) is Registry and records(source) == records(filled)


def test_what_an_older_xpert_published(tmp_path: Path) -> None:
    """Its mixture still names the registry of its publisher."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "version-1", tmp_path / "old")
    old, target = Registry(tmp_path / "old"), open_registry(f"memory://{tmp_path.name}/new")
    copied = copy_versions(old, target, ["acme/two"])
    assert copied[-1].ref == "acme/two@1" and all(one.new for one in copied) and len(copied) > 1
    assert files_of(target.pull("acme/two", tmp_path / "a")) == files_of(old.pull("acme/two", tmp_path / "b"))
    assert list(target.verify()) == []


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def test_only_what_is_asked_for(filled: Registry, tmp_path: Path) -> None:
    target = Registry(tmp_path / "target")
    assert [one.ref for one in copy_versions(filled, target, ["acme/sums"])] == ["acme/sums@2"]
    assert [one.ref for one in copy_versions(filled, target, ["acme/sums@stable", "acme/sums@1"])] == ["acme/sums@1"]
    assert dict(target.tags("acme/sums")) == {"latest": 2}


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_numbers_that_are_taken(filled: Registry, expert: Maker, tmp_path: Path, place: str) -> None:
    location = str(tmp_path / "target") if place == "folder" else f"memory://{tmp_path.name}/target"
    target = open_registry(location)
    target.publish(expert("other", seed=9), "acme/sums")
    before = records(target)
    with pytest.raises(BadInput, match=r"acme/sums@1 has another content"):
        copy_versions(filled, target, ["acme/sums@1"])
    assert copy_versions(filled, target, ["acme/sums@2"])[0].new
    target.remove("acme/sums@2")
    with pytest.raises(BadInput, match="was removed from"):
        copy_versions(filled, target, ["acme/sums@2"])
    target.publish(expert("case", seed=8), "acme/Rhymes")
    with pytest.raises(BadInput, match="by case only"):
        copy_versions(filled, target, ["acme/rhymes"])
    assert {name: data for name, data in records(target).items() if "Rhymes" not in name} == before
    assert list(target.verify()) == []


def test_two_copies_at_once(filled: Registry, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine copies the same version between this one's looking and writing."""
    a, b = open_registry(f"{s3_bucket}/x"), open_registry(f"{s3_bucket}/x")
    push = b.remote.push
    raced: list[object] = []

    def late(record, *given, **named):  # type: ignore[no-untyped-def]
        if not raced:
            raced.append(copy_versions(filled, a, ["acme/sums@1"]))
        return push(record, *given, **named)

    b.remote.push = late
    assert [one.ref for one in copy_versions(filled, b, ["acme/sums@1"])] == ["acme/sums@1"]
    assert len(raced) == 1 and records(a).keys() == {"acme/sums@1.json"}


def test_signatures_go_along(filled: Registry, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys = [SigningKey.generate(tmp_path / f"key{n}") for n in range(2)]
    filled.sign("acme/sums@1", keys[0])
    for location in (str(tmp_path / "folder"), f"memory://{tmp_path.name}/x"):
        target = open_registry(location)
        copy_versions(filled, target, ["acme/sums@1"])
        assert target.signatures_of(target.record("acme/sums@1")) == filled.signatures_of(filled.record("acme/sums@1"))
        target.sign("acme/sums@1", keys[1])  # what others signed there stays
        copy_versions(filled, target, ["acme/sums@1"])
        signed = {made.key for made in target.signatures_of(target.record("acme/sums@1"))}
        assert signed == {key.public.key for key in keys} and list(target.verify()) == []


def test_damage_is_not_copied(filled: Registry, tmp_path: Path) -> None:
    for _, path in filled.blobs.all():
        path.chmod(0o644)
        path.write_bytes(b"?" + path.read_bytes()[1:])
    target = Registry(tmp_path / "target")
    with pytest.raises(Corrupt, match="damaged"):
        copy_versions(filled, target, ["acme/sums@1"])
    assert not target.folder.exists()


def test_what_may_not_be_published_may_not_be_copied(filled: Registry, tmp_path: Path) -> None:
    """A folder that is no expert does not enter by way of a record that says it is."""
    folder = filled.pull("acme/sums@1", tmp_path / "out")
    (folder / "more.json").write_text("{}")
    with pytest.raises(Corrupt, match="other files than the record says"):
        Registry(tmp_path / "target").adopt(filled.record("acme/sums@1"), folder)


def test_the_command(xpert: Run, filled: Registry, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    made = xpert("registry", "copy", "acme/both", "--to", there, "--tags", "--registry", filled.folder)
    assert made.exit_code == 0, made.stderr
    assert made.stdout == "copied acme/sums@1, tagged stable\ncopied acme/rhymes@1\ncopied acme/both@1\n"
    again = xpert("registry", "copy", "acme/both", "--to", there, "--registry", filled.folder, "--json")
    told = json.loads(again.stdout)
    assert told["to"] == str(tmp_path / "there") and [one["new"] for one in told["copied"]] == [False] * 3


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "nothing named": (["--to", "{there}"], 2, "Missing argument"),
    "no target": (["acme/sums"], 2, "--to"),
    "into itself": (["acme/sums", "--to", "{here}"], 2, "copied into itself"),
    "misspelt": (["acme/sms", "--to", "{there}"], 2, "Did you mean 'acme/sums'?"),
    "no such place": (["acme/sums", "--to", "gopher://x/y"], 2, "no registries are known"),
    "a key in the address": (["acme/sums", "--to", "s3://AKIA:hush@bucket/x"], 2, "credentials"),
    "not installed": (["acme/sums", "--to", "gs://bucket/x"], 3, "pip install gcsfs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, xpert: Run, filled: Registry, tmp_path: Path) -> None:
    arguments, status, said = MISTAKES[mistake]
    given = [argument.format(here=filled.folder, there=tmp_path / "there") for argument in arguments]
    result = xpert("registry", "copy", *given, "--registry", filled.folder)
    assert result.exit_code == status and said in result.stderr, result.stderr
    assert "hush" not in result.stderr and result.stdout == "" and not (tmp_path / "there").exists()
