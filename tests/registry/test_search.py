"""Search by meaning: the taxonomy's, and an embedder's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.registry.searching import open_fixed_embedder
from xpert.registry.skills.taxonomy import Taxonomy
from xpert.registry.store import Registry

Maker = Callable[..., Path]


class Counts:
    """An embedder of letters: fixed, plain, and enough to tell words apart."""

    identity = "letters/1"
    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def fit(self, texts: Sequence[str]) -> None: ...

    def embed(self, texts: Sequence[str], progress: object = None) -> NDArray[np.float32]:
        self.asked += texts
        rows = np.array(
            [[text.lower().count(letter) + 1e-3 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        )
        found: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return found


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Counts:
    embedder = Counts()
    monkeypatch.setattr("xpert.registry.reading.open_fixed_embedder", lambda spec, device: embedder)
    return embedder


@pytest.fixture
def filled(registry: Registry, expert: Maker) -> Registry:
    for seed, (name, skills, scores) in enumerate(
        [
            ("acme/fr", ("translation_fr",), {"translation_fr": 0.6, "sums": 0.9}),
            ("acme/de", ("german-translation",), {"german-translation": 0.8}),
            ("acme/sums", ("sums",), {"sums": 0.7, "translation_fr": 0.0}),
            ("acme/plain", ("chess",), {}),
        ]
    ):
        registry.publish(expert(name.replace("/", "-"), seed=seed, skills=skills, scores=scores), name)
    return registry


def refs(registry: Registry, text: str, **options: object) -> list[str]:
    return [hit.version.ref for hit in registry.search(text, **options)]  # type: ignore[arg-type]


def test_a_taxonomy_finds_what_goes_by_other_names(filled: Registry) -> None:
    taxonomy = Taxonomy.builtin()
    assert all(hit.partial for hit in filled.search("french translation"))
    (hit,) = filled.search("french translation", taxonomy=taxonomy)
    assert (hit.version.ref, hit.skill, hit.score) == ("acme/fr@1", "translation_fr", 0.6)
    assert refs(filled, "translation", taxonomy=taxonomy) == ["acme/de@1", "acme/fr@1"]
    assert refs(filled, "french translation", taxonomy=taxonomy, min_score=0.65) == []
    assert refs(filled, "translation", taxonomy=taxonomy, min_score=0.65) == ["acme/de@1"]


def test_what_scored_nothing_is_no_skill(filled: Registry) -> None:
    assert "acme/sums@1" not in refs(filled, "translation_fr", taxonomy=Taxonomy.builtin())


def test_an_embedder_adds_the_closest_and_orders_by_both(filled: Registry, letters: Counts) -> None:
    hits = filled.search("sums", embedder="letters")
    assert hits[0].version.ref == "acme/sums@1" and {hit.version.ref for hit in hits} == {
        *("acme/sums@1", "acme/fr@1", "acme/de@1", "acme/plain@1")
    }
    assert all(hit.similarity is not None for hit in hits)
    assert filled.search("sums", embedder="letters", limit=2) == hits[:2]
    assert refs(filled, "sums", embedder="letters", min_score=0.8) == ["acme/fr@1", "acme/de@1"]


def test_the_closest_are_sought_among_those_that_meet_the_conditions(
    filled: Registry, letters: Counts, expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpert.registry.searching._CLOSEST", 1)
    filled.publish(expert("far", seed=9, skills=("zoology",), base="other"), "acme/far")
    assert "acme/far@1" not in refs(filled, "chess games", embedder="letters")
    assert refs(filled, "chess games", embedder="letters", base="other") == ["acme/far@1"]
    assert refs(filled, "chess games", embedder="letters", min_score=0.85) == ["acme/fr@1"]


def test_an_embedder_needs_words(filled: Registry, letters: Counts) -> None:
    with pytest.raises(BadInput, match="nothing is asked"):
        filled.search("", embedder="letters")


def test_similarity_is_the_cosine_with_the_text_of_a_version(filled: Registry, letters: Counts) -> None:
    hits = {hit.version.ref: hit.similarity for hit in filled.search("chess games", embedder="letters")}
    texts = [text for text in letters.asked if text != "chess games"]
    ask, *rows = letters.embed(["chess games", *texts])
    plain = dict(zip(texts, np.array(rows) @ ask, strict=True))
    assert sorted(plain.values()) == pytest.approx(
        sorted(value for value in hits.values() if value is not None), abs=1e-3
    )


def test_vectors_are_made_once_and_only_for_what_is_latest(filled: Registry, letters: Counts, expert: Maker) -> None:
    filled.search("sums", embedder="letters")
    assert len(letters.asked) == 5
    filled.search("chess", embedder="letters")
    assert len(letters.asked) == 6
    filled.publish(expert("new", seed=77, skills=("poetry",)), "acme/plain")
    filled.remove("acme/de")
    assert "acme/plain@2" in refs(filled, "poetry", embedder="letters") and len(letters.asked) == 8
    assert not {"acme/de@1", "acme/plain@1"} & set(refs(filled, "poetry", embedder="letters"))
    filled.rebuild()
    assert "acme/plain@2" in refs(filled, "poetry", embedder="letters")


def test_some_of_the_words_where_nothing_holds_them_all(filled: Registry) -> None:
    assert [(hit.version.ref, hit.partial) for hit in filled.search("chess endgames")] == [("acme/plain@1", True)]
    assert {hit.version.ref for hit in filled.search("chess sums unheard")} == {
        *("acme/plain@1", "acme/sums@1", "acme/fr@1")
    }
    assert not any(hit.partial for hit in filled.search("acme sums"))
    assert refs(filled, "acme chess", min_score=0.9) == []  # acme/plain holds both, and has no score
    assert refs(filled, "unheard of") == []


def test_kind_and_limit(filled: Registry, tmp_path: Path) -> None:
    made = tmp_path / "mixture.json"
    made.write_text(json.dumps({"kind": "mixture", "experts": [{"ref": "acme/sums@1"}]}))
    filled.publish(made, "acme/sums-and-more")
    assert refs(filled, "sums", kind="mixture") == ["acme/sums-and-more@1"]
    assert refs(filled, "acme", kind="expert", limit=2) == refs(filled, "acme", kind="expert")[:2]
    assert len(refs(filled, "")) == 5


def test_embedders_that_learn_from_the_texts_are_refused() -> None:
    with pytest.raises(BadInput, match="learns from the texts") as caught:
        open_fixed_embedder("lsa")
    assert caught.value.hint and "minilm" in caught.value.hint


@pytest.mark.real
def test_meaning_with_a_real_embedder(xpert: Callable[..., Result], expert: Maker) -> None:
    for seed, text in enumerate(("Adds and multiplies numbers", "Answers questions on cooking", "Writes sonnets")):
        folder = expert(f"e{seed}", seed=seed, description=text, skills=(f"s{seed}",))
        xpert("registry", "publish", folder, "--name", f"acme/e{seed}")
    for asked, wanted in (("arithmetic", "e0"), ("recipes for dinner", "e1"), ("poems", "e2")):
        hits = json.loads(xpert("registry", "search", asked, "--embedder", "minilm", "--json").stdout)["hits"]
        assert hits[0]["name"] == f"acme/{wanted}"
    assert "LIKE" in xpert("registry", "search", "poems", "--embedder", "minilm").stdout
