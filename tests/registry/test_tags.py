from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xpert.errors import BadInput, NotFound
from xpert.registry.documents import DocumentName, Tag, parse_document
from xpert.registry.store import Registry

Maker = Callable[..., Path]


@pytest.fixture
def three(registry: Registry, expert: Maker) -> Registry:
    """`acme/a` in three versions, each of a skill of its own."""
    for seed in (1, 2, 3):
        registry.publish(expert(f"e{seed}", seed=seed, skills=(f"skill{seed}",)), "acme/a")
    return registry


def test_latest_follows_until_it_is_moved_and_from_the_next_publish_on(three: Registry, expert: Maker) -> None:
    assert three.tags("acme/a") == {"latest": 3}
    assert three.tag("acme/a@2", "latest").version == 2
    assert three.resolve("acme/a").version == three.resolve("acme/a@latest").version == 2
    assert [hit.version.version for hit in three.search("skill2")] == [2] and list(three.search("skill3")) == []
    assert [entry.latest.version for entry in three.list()] == [2]
    three.publish(expert("e4", seed=4), "acme/a")
    assert three.resolve("acme/a").version == 4
    three.publish(expert("e5", seed=5), "acme/a", latest=False)
    assert three.resolve("acme/a").version == 4 and three.resolve("acme/a@5").version == 5
    three.untag("acme/a", "latest")
    assert three.resolve("acme/a").version == 5


def test_other_tags_move_by_hand_only(three: Registry, expert: Maker) -> None:
    three.tag("acme/a@1", "stable")
    three.tag("acme/a@stable", "old")
    three.publish(expert("e4", seed=4), "acme/a", tags=("next", "trial"))
    wanted = {"latest": 4, "next": 4, "old": 1, "stable": 1, "trial": 4}
    assert three.tags("acme/a") == wanted and three.list()[0].tags == wanted
    assert three.show("acme/a@stable").tags == wanted and three.show("acme/a@stable").version.version == 1
    three.tag("acme/a@3", "stable")
    assert three.resolve("acme/a@stable").version == 3 and three.verify() == []
    three.untag("acme/a", "stable")
    with pytest.raises(NotFound, match="no tag 'stable'") as caught:
        three.resolve("acme/a@stable")
    assert caught.value.hint == "it has latest (4), next (4), old (1), trial (4)"


def test_a_tag_of_a_removed_version_goes_with_it(three: Registry) -> None:
    three.tag("acme/a@3", "stable")
    three.tag("acme/a@2", "other")
    three.tag("acme/a@3", "latest")
    three.remove("acme/a@3")
    assert three.tags("acme/a") == {"latest": 2, "other": 2}
    assert three.verify() == []


def test_tags_outlast_the_index(three: Registry) -> None:
    three.tag("acme/a@1", "stable")
    three.tag("acme/a@2", "stable")
    three.tag("acme/a@1", "latest")
    before = three.list()
    for file in three.folder.glob("index.sqlite*"):
        file.unlink()
    assert three.list() == before and before[0].latest.version == 1


def test_a_publisher_that_died_before_the_index_has_moved_its_tag(three: Registry, tmp_path: Path) -> None:
    """The document is the truth: an index of before the move is brought up to date."""
    old = (three.folder / "index.sqlite").read_bytes()
    three.tag("acme/a@1", "stable")
    for file in three.folder.glob("index.sqlite*"):
        file.unlink()
    (three.folder / "index.sqlite").write_bytes(old)
    assert three.tags("acme/a") == {"latest": 3, "stable": 1}


@pytest.mark.parametrize("tag", ["", "3", "V1", "a b", "a/b", "-x", "x" * 33, "é"])
def test_what_is_no_tag(three: Registry, tag: str) -> None:
    with pytest.raises(BadInput, match="is not a tag"):
        three.tag("acme/a@1", tag)
    with pytest.raises(BadInput, match="is not a tag"):
        three.publish(three.folder, "acme/b", tags=(tag,))


def test_names_of_documents() -> None:
    for text in ("a/b@3.json", "a/b@3.removed.json", "a/b@3.signatures.json", "a/b@stable.tag.json"):
        assert str(parse_document(text)) == text
    for text in (
        "a@3.json",
        "a/b@0.json",
        "a/b@x.json",
        "a/b@3.other.json",
        "a/b@3.tag.json",
        "../b@3.json",
        "a/b.json",
    ):
        with pytest.raises(BadInput):
            parse_document(text)


def test_who_dies_while_moving_a_tag_leaves_no_fault(three: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """At either of its two writes: of the copy, and of the name."""
    three.tag("acme/a@1", "stable")
    for step in ("xpert.registry.blobs.BlobStore.put_bytes", "xpert.registry.record_folder.RecordFolder._write"):
        with monkeypatch.context() as patch:
            patch.setattr(step, lambda *given, **more: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                three.tag("acme/a@2", "stable")
        assert three.verify() == [] and three.tags("acme/a")["stable"] == 1
    three.tag("acme/a@3", "stable")
    three.gc()
    assert three.rebuild().restored == () and three.tags("acme/a")["stable"] == 3


def test_tags_that_stay_are_not_read_again(three: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag in ("a", "b", "c", "d"):
        three.tag("acme/a@1", tag)
    three.list()
    read: list[str] = []
    usual = three.records.read_tag

    def counted(document: DocumentName) -> Tag:
        read.append(str(document.tag))
        return usual(document)

    monkeypatch.setattr(three.records, "read_tag", counted)
    three.publish(expert("e4", seed=4), "acme/a", tags=("e",))
    three.list()
    assert read == []
    other = Registry(three.folder)  # another process, as far as the index is concerned
    other.tag("acme/a@2", "b")
    (three.folder / "records/acme/a@c.tag.json").touch()  # written anew with the same content
    assert three.tags("acme/a")["b"] == 2 and three.tags("acme/a")["c"] == 1
    assert set(read) <= {"c"}
