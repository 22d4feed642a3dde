"""Names and index are made again from the blobs; a registry of version 1 is read and brought forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from xpert.errors import Corrupt, NotFound
from xpert.registry.store import Registry
from xpert.storage import hash_file, read_json, write_json

Maker = Callable[..., Path]
VERSION_1 = Path(__file__).parent / "fixtures" / "version-1"


@pytest.fixture
def full(registry: Registry, expert: Maker, tmp_path: Path) -> Registry:
    for seed in (1, 2, 3):
        registry.publish(expert(f"a{seed}", seed=seed), "acme/a")
    registry.publish(expert("b", seed=9, scores={"arithmetic": 0.5}), "bell/b", tags=("stable",))
    made = tmp_path / "mixture.json"
    made.write_text(json.dumps({"kind": "mixture", "experts": [{"ref": "acme/a@1"}, {"ref": "bell/b@1"}]}))
    registry.publish(made, "acme/mix")
    registry.tag("acme/a@1", "stable")
    registry.tag("acme/a@3", "stable")
    registry.remove("acme/a@2")
    return registry


def _keep_only_blobs(registry: Registry) -> None:
    for path in registry.folder.iterdir():
        if path.name != "blobs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_registry_comes_back_from_its_blobs_alone(full: Registry, expert: Maker, tmp_path: Path) -> None:
    before = full.list()
    names = sorted(path.relative_to(full.folder) for path in (full.folder / "records").rglob("*.json"))
    _keep_only_blobs(full)
    with pytest.raises(Exception, match="not a registry"):
        full.list()
    rebuilt = full.rebuild()
    assert (rebuilt.versions, rebuilt.removed, rebuilt.problems) == (4, 1, ())
    assert full.list() == before and full.tags("acme/a") == {"latest": 3, "stable": 3}
    assert sorted(path.relative_to(full.folder) for path in (full.folder / "records").rglob("*.json")) == names
    assert full.verify() == []
    assert full.pull("acme/a@stable", tmp_path / "out").is_dir()
    assert full.publish(expert("a4", seed=4), "acme/a").version == 4
    assert full.rebuild().restored == ()  # a sound registry stays as it is


def test_gc_before_and_after_leaves_what_counts(full: Registry) -> None:
    full.gc()
    before = full.list()
    _keep_only_blobs(full)
    full.rebuild()
    assert full.list() == before and full.gc().files == 0 and full.verify() == []


def test_gc_refuses_where_names_are_lost(full: Registry) -> None:
    shutil.rmtree(full.folder / "records")
    for file in full.folder.glob("index.sqlite*"):
        file.unlink()
    with pytest.raises(Corrupt, match="is missing") as caught:
        full.gc()
    assert caught.value.hint and "rebuild" in caught.value.hint
    full.rebuild()
    assert full.gc().files > 0 and full.verify() == []


def test_damaged_documents_come_back_from_their_copies(full: Registry) -> None:
    for path in (full.folder / "records").rglob("*.json"):
        good = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(good[:-9])
        if ".removed" not in path.name:
            assert full.verify(), path
        assert full.rebuild().restored == (str(path.relative_to(full.folder / "records")),)
        assert path.read_bytes() == good
    assert full.verify() == []


def test_damaged_copies_are_made_again_and_reported_before(full: Registry) -> None:
    for path in [p for p in (full.folder / "blobs" / "documents").rglob("*") if p.is_file()]:
        path.chmod(0o644)
        path.write_bytes(b"rot")
    assert all("copy" in problem.what or "damaged" in problem.what for problem in full.verify())
    full.rebuild()
    full.gc()  # copies of documents that are no longer in force
    assert full.verify() == []


def test_content_cannot_pass_for_a_document(full: Registry, expert: Maker) -> None:
    """A published file that looks like the record of another name does not become one."""
    folder = expert("forged", seed=50)
    record = json.loads((full.folder / "records" / "bell" / "b@1.json").read_text())
    (folder / "note.json").write_text(json.dumps(record | {"name": "bell/forged"}))
    (folder / "more.json").write_bytes((full.folder / "records" / "bell" / "b@1.json").read_bytes())
    full.publish(folder, "acme/forged")
    full.remove("bell/b", force=True)
    full.gc()
    _keep_only_blobs(full)
    full.rebuild()
    assert "bell/b" not in {entry.latest.name for entry in full.list()}


def test_there_is_nothing_to_rebuild(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no registry"):
        registry.rebuild()
    (tmp_path / "registry").mkdir()
    with pytest.raises(NotFound):
        registry.rebuild()


@pytest.fixture
def old(tmp_path: Path) -> Registry:
    """A registry as xpert wrote it at schema 1."""
    shutil.copytree(VERSION_1, tmp_path / "old")
    return Registry(tmp_path / "old")


def test_a_registry_of_version_1_is_brought_forward(old: Registry, expert: Maker, tmp_path: Path) -> None:
    entries = {entry.latest.name: entry.versions for entry in old.list()}
    assert entries == {"acme/dates": (1, 2), "acme/sums": (1,), "acme/two": (1,), "other/sums": (1,)}
    assert json.loads((old.folder / "registry.json").read_text())["schema"] == 2
    assert old.verify() == []
    details = old.show("acme/dates@1")
    assert details.document["description"] == "Finds dates in French reports"
    assert details.version.skills == ("dates", "french", "sums") and details.version.strengths == ("dates", "french")
    assert [hit.version.ref for hit in old.search("adds")] == ["acme/sums@1", "other/sums@1"]
    pulled = old.pull("acme/two", tmp_path / "mix")
    assert hash_file(pulled / "mixture.json") == next(f.sha256 for f in old.show("acme/two").files)
    assert old.publish(expert("new", seed=4, skills=("chess",)), "acme/old").version == 2  # version 1 was removed
    assert old.publish(expert("more", seed=5), "acme/dates", tags=("stable",)).version == 3
    _keep_only_blobs(old)
    assert old.rebuild().versions == 7
    assert old.verify() == [] and old.resolve("acme/dates@stable").version == 3


def test_a_registry_of_version_1_that_may_only_be_read(old: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpert.registry.reading.os.access", lambda path, mode: False)
    before = sorted((path, hash_file(path)) for path in old.folder.rglob("*") if path.is_file())
    assert old.show("acme/dates").version.version == 2 and len(old.list()) == 4
    assert sorted((path, hash_file(path)) for path in old.folder.rglob("*") if path.is_file()) == before


def test_a_remover_that_died_after_its_mark(full: Registry) -> None:
    """The mark counts: the record that is left is no version, no fault, and goes with the next `gc`."""
    record = full.folder / "records" / "bell" / "b@1.json"
    data = record.read_bytes()
    full.remove("bell/b", force=True)
    full.remove("acme/mix")
    record.write_bytes(data)
    assert "bell/b" not in {entry.latest.name for entry in full.list()} and full.verify() == []
    full.gc()
    assert not record.exists() and full.verify() == [] and full.gc().files == 0
    record.write_bytes(data)
    full.rebuild()
    assert "bell/b" not in {entry.latest.name for entry in full.list()} and full.verify() == []


def test_publishing_again_mends_a_file_that_version_1_kept_whole(
    registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = expert()
    weights = {"a.lora_A.weight": np.arange(1 << 15, dtype=np.float32).reshape(8, -1)}
    save_file(weights, folder / "adapter_model.safetensors")
    card = read_json(folder / "expert.json")
    card["files"]["adapter_model.safetensors"] = hash_file(folder / "adapter_model.safetensors")
    write_json(folder / "expert.json", card)
    with monkeypatch.context() as patch:
        patch.setattr("xpert.registry.cutting._lengths", lambda path, size: [size])
        registry.publish(folder, "acme/a")
    blob = registry.blobs.path(hash_file(folder / "adapter_model.safetensors"))
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    assert registry.publish(folder, "acme/a").repeated
    assert registry.verify() == []
