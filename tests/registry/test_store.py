from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.registry.index import Index
from xpert.registry.store import Registry
from xpert.storage import cache_folder, hash_file

Maker = Callable[..., Path]


def _mixture(path: Path, *refs: str, **more: object) -> Path:
    path.write_text(json.dumps({"kind": "mixture", "experts": [{"ref": ref} for ref in refs], **more}))
    return path


def test_what_is_published_comes_back_byte_for_byte(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    folder = expert(scores={"arithmetic": 0.8})
    (folder / ".hidden").write_text("x")
    (folder / "checkpoint-10").mkdir()
    version = registry.publish(folder, "acme/sums")
    assert (version.ref, version.kind, version.base) == ("acme/sums@1", "expert", "tiny")
    pulled = registry.pull("acme/sums", tmp_path / "out")
    kept = {p.name: hash_file(p) for p in folder.iterdir() if p.is_file() and p.name != ".hidden"}
    assert {p.name: hash_file(p) for p in pulled.iterdir()} == kept
    assert registry.verify() == []
    details = registry.show("acme/sums@latest")
    assert details.document["profile"]["skills"]["arithmetic"]["expert"]["score"] == 0.8
    assert {file.path: file.sha256 for file in details.files} == kept


def test_equal_content_is_published_once(registry: Registry, expert: Maker) -> None:
    first, second = expert("a", seed=1), expert("b", seed=2)
    assert registry.publish(first, "acme/a").version == 1
    assert registry.publish(second, "acme/a").version == 2
    again = registry.publish(first, "acme/a")
    assert again.repeated and again.version == 1
    other = registry.publish(first, "acme/other")
    assert other.version == 1 and not other.repeated and other.digest == again.digest
    assert [(e.latest.ref, e.versions) for e in registry.list()] == [("acme/a@2", (1, 2)), ("acme/other@1", (1,))]


def test_numbers_of_removed_versions_stay_taken(registry: Registry, expert: Maker) -> None:
    for seed in range(3):
        registry.publish(expert(f"e{seed}", seed=seed), "acme/a")
    registry.remove("acme/a@3")
    assert registry.resolve("acme/a").version == 2
    assert registry.publish(expert("e4", seed=4), "acme/a").version == 4
    registry.remove("acme/a")
    for index in registry.folder.glob("index.sqlite*"):
        index.unlink()
    assert list(registry.list()) == []
    assert registry.publish(expert("e5", seed=5), "acme/a").version == 5


def test_the_index_is_made_again_from_the_records(registry: Registry, expert: Maker) -> None:
    for seed, name in enumerate(("acme/a", "acme/a", "bell/b")):
        registry.publish(expert(f"e{seed}", seed=seed, scores={"arithmetic": 0.5}), name)
    registry.remove("acme/a@1")
    before = registry.list()
    for index in registry.folder.glob("index.sqlite*"):
        index.unlink()
    assert registry.list() == before
    assert registry.verify() == []


def test_a_damaged_index_says_how_to_mend_it(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    for index in registry.folder.glob("index.sqlite*"):
        index.unlink()
    (registry.folder / "index.sqlite").write_bytes(b"no database at all, yet long enough to be read" * 40)
    with pytest.raises(Corrupt, match="index is damaged") as caught:
        registry.list()
    assert caught.value.hint and "registry rebuild" in caught.value.hint
    registry.rebuild()
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]


@pytest.mark.parametrize(
    "statement", ["DROP TABLE tags", "UPDATE versions SET skills = '{broken'", "UPDATE versions SET uses = x'ff'"]
)
def test_an_index_that_only_sqlite_finds_sound(registry: Registry, expert: Maker, statement: str) -> None:
    registry.publish(expert(), "acme/a")
    connection = sqlite3.connect(registry.folder / "index.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(Corrupt, match=r"the index is damaged.*") as caught:
        registry.list()
    assert "rebuild" in str(caught.value)
    registry.rebuild()
    assert registry.verify() == [] and registry.resolve("acme/a").skills == ("arithmetic",)


def test_a_registry_that_may_only_be_read(registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish(expert(description="adds numbers"), "acme/a")
    for index in registry.folder.glob("index.sqlite*"):
        index.unlink()
    monkeypatch.setattr("xpert.registry.reading.os.access", lambda path, mode: False)
    assert [hit.version.ref for hit in registry.search("numbers")] == ["acme/a@1"]
    assert not (registry.folder / "index.sqlite").exists()


def test_the_cached_folder_is_used_again_and_mended(registry: Registry, expert: Maker) -> None:
    version = registry.publish(expert(), "acme/a")
    folder = registry.pull("acme/a")
    assert folder == cache_folder() / "experts" / version.digest
    made = (folder / "expert.json").stat().st_ino
    assert registry.pull("acme/a@1") == folder and (folder / "expert.json").stat().st_ino == made
    (folder / "README.md").write_text("changed")
    assert registry.pull("acme/a") == folder
    assert (folder / "README.md").read_text() != "changed"
    assert [path.name for path in folder.parent.iterdir()] == [version.digest]


def test_publishing_again_mends_a_damaged_blob(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    folder = expert()
    registry.publish(folder, "acme/a")
    for path in (p for p in (registry.folder / "blobs").rglob("*") if p.is_file()):
        path.chmod(0o644)
        path.write_bytes(b"rot")
    assert registry.verify()
    assert registry.publish(folder, "acme/a").repeated
    assert registry.verify() == []


def test_missing_and_strange_files_are_found(registry: Registry, expert: Maker) -> None:
    registry.publish(expert("a"), "acme/a")
    registry.publish(expert("b", seed=2), "acme/b")
    (registry.folder / "blobs" / "stray").write_text("x")
    (registry.folder / "records" / "acme" / "notes.txt").write_text("x")
    (registry.folder / "records" / "acme" / "b@1.json").unlink()
    found = {(problem.where, problem.what) for problem in registry.verify()}
    assert found == {
        ("blobs/stray", "does not belong here"),
        ("records/acme/notes.txt", "does not belong here"),
        ("acme/b@1", "its record is missing"),
    }
    with pytest.raises(Corrupt, match="record"):
        registry.gc()
    registry.remove("acme/b@1")
    assert registry.publish(expert("c", seed=2), "acme/b").version == 2


def test_gc_takes_what_no_version_needs(registry: Registry, expert: Maker) -> None:
    registry.publish(expert("a", seed=1), "acme/a")
    registry.publish(expert("b", seed=2), "acme/b")
    assert registry.gc().files == 0
    registry.remove("acme/b")
    (registry.folder / "drafts" / "elsewhere.1.abc").write_text("under way on another machine")
    would = registry.gc(dry_run=True)
    assert would.files == 5  # with the record's copy; exemplars.jsonl is shared with the other expert
    assert registry.gc() == would
    assert registry.gc().files == 0
    assert registry.verify() == []
    assert registry.pull("acme/a").is_dir()


def test_mixtures_need_their_experts(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    version = registry.publish(expert("a", skills=("sums",)), "acme/a")
    made = _mixture(tmp_path / "m.json", "acme/a@1", base={"ref": "tiny", "fingerprint": "tiny-fingerprint"})
    mixture = registry.publish(made, "acme/mix")
    assert (mixture.kind, mixture.skills, mixture.uses) == ("mixture", ("sums",), ("acme/a@1",))
    assert [path.name for path in registry.pull("acme/mix").iterdir()] == ["mixture.json"]
    for refs, said in (
        (("acme/b@1",), "nothing is published"),
        (("acme/a@2",), "no version 2"),
        (("acme/a",), "without a version"),
        (("./folder",), "no registered expert"),
        (("acme/mix@1",), "is a mixture"),
        ((), "lists no experts"),
    ):
        with pytest.raises(BadInput, match=said):
            registry.publish(_mixture(tmp_path / "bad.json", *refs), "acme/bad")
    with pytest.raises(BadInput, match="another base"):
        registry.publish(_mixture(tmp_path / "bad.json", "acme/a@1", base={"fingerprint": "other"}), "acme/bad")
    weights = hash_file(registry.pull("acme/a") / "adapter_model.safetensors")
    for fingerprint in (version.digest, weights, "0" * 64):
        made.write_text(json.dumps({"kind": "mixture", "experts": [{"ref": "acme/a@1", "fingerprint": fingerprint}]}))
        if fingerprint == "0" * 64:
            with pytest.raises(BadInput, match="another content"):
                registry.publish(made, "acme/mix2")
        else:
            registry.publish(made, "acme/mix2")
    with pytest.raises(BadInput, match="acme/mix@1 refers to acme/a@1"):
        registry.remove("acme/a")
    registry.remove("acme/a", force=True)
    assert {problem.where for problem in registry.verify()} == {"acme/mix@1", "acme/mix2@1", "acme/mix2@2"}


def test_names_of_one_kind_and_case(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert("a"), "acme/a")
    for name in ("acme/A", "Acme/b"):
        with pytest.raises(BadInput, match="case only"):
            registry.publish(expert(name.replace("/", "-")), name)
    with pytest.raises(BadInput, match="is the name of an expert, not of a mixture"):
        registry.publish(_mixture(tmp_path / "m.json", "acme/a@1"), "acme/a")


@pytest.mark.parametrize("full_text", [True, False])
def test_search(registry: Registry, expert: Maker, full_text: bool) -> None:
    registry.publish(expert("x", seed=9), "seed/x")
    if not full_text:
        for file in registry.folder.glob("index.sqlite*"):
            file.unlink()
        with Index.open(registry.folder / "index.sqlite", full_text=False) as index:
            assert not index.has_words
    registry.publish(expert("a", description="French translation, café"), "acme/one")
    registry.publish(expert("b", scores={"french-poems": 0.9, "sums": 0.2}, base="big"), "bell/two_verse")
    registry.publish(expert("c", seed=3, skills=("old",)), "acme/three")
    registry.publish(expert("d", seed=4, skills=("new",)), "acme/three")

    def found(text: str, **limits: object) -> set[str]:
        return {hit.version.ref for hit in registry.search(text, **limits)}

    assert found("fren") == {"acme/one@1", "bell/two_verse@1"}
    assert found("french TRANS") == {"acme/one@1"}
    assert found("french cooking") == {"acme/one@1", "bell/two_verse@1"}  # nothing holds both
    assert found("cafe") == found("CAFÉ") == {"acme/one@1"}
    assert found("verse") == {"bell/two_verse@1"}
    assert found("old") == set() and found("new") == {"acme/three@2"}
    assert found('"quoted" OR NEAR( *') == set()
    assert len(found("")) == 4
    assert found("", base="big") == found("", base="big-fingerp") == {"bell/two_verse@1"}
    assert found("", min_score=0.5) == found("poems", min_score=0.5) == {"bell/two_verse@1"}
    assert found("sums", min_score=0.5) == set()


def test_a_name_that_does_not_exist(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no registry"):
        registry.list()
    registry.publish(expert(), "acme/sums")
    with pytest.raises(NotFound) as caught:
        registry.resolve("acme/sms")
    assert caught.value.hint == "did you mean 'acme/sums'?"
    with pytest.raises(BadInput, match="holds other things"):
        Registry(tmp_path).publish(tmp_path / "experts" / "expert", "acme/a")
    shutil.rmtree(registry.folder)
    assert list(Registry().list()) == []


def test_a_newer_registry_is_left_alone(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    mark = registry.folder / "registry.json"
    mark.write_text('{"kind": "registry", "schema": 99}')
    with pytest.raises(BadInput, match="newer xpert"):
        registry.list()


def test_profiled_skills_that_are_none(registry: Registry, expert: Maker) -> None:
    """What a profile finds an expert no better at than its base, and mostly wrong, is not called a skill of it."""
    scores = {"arithmetic": 0.05, "poetry": 0.12, "chess": 0.3, "go": 0.6}  # the base has 0.1 in each
    version = registry.publish(expert(skills=("arithmetic",), scores=scores), "acme/a")
    assert version.skills == ("arithmetic", "chess", "go") and dict(version.scores) == scores


def test_the_owner_is_no_likeness(registry: Registry, expert: Maker) -> None:
    registry.publish(expert("a"), "acme/sums")
    registry.publish(expert("b", seed=1), "bell/verse")
    for asked, hint in (
        ("acme/sms", "did you mean 'acme/sums'?"),
        ("acme/poetry", "`xpert registry list` shows what there is"),
        ("bel/verse", "did you mean 'bell/verse'?"),
    ):
        with pytest.raises(NotFound) as caught:
            registry.resolve(asked)
        assert caught.value.hint == hint
