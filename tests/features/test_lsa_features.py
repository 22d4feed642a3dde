"""Features with the default embedder: what they promise, and that the cache changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.data import pool_from_rows
from xpert.embedders.lsa import Lsa
from xpert.embedding import FittedEmbedder, normalise, open_embedder
from xpert.errors import BadInput, NotFound
from xpert.features import FeatureOptions, Features, estimate_tokens
from xpert.pool import Pool
from xpert.progress import Silent
from xpert.protocols import EmbedderContext
from xpert.records import Message, Row, Shots

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=30)


def pool_of(*prompts: str) -> Pool:
    return pool_from_rows([Row(str(i), (Message("user", p),), f"answer {i}") for i, p in enumerate(prompts)])


def fitted(texts: Sequence[str], seed: int = 0) -> tuple[Lsa, np.ndarray[Any, Any]]:
    embedder = Lsa(EmbedderContext(seed=seed))
    return embedder, embedder.fit_embed(texts)


class Said(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


# ── the embedder ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS)
def test_any_texts_give_finite_rows_of_length_one_or_zero(texts: list[str]) -> None:
    embedder, rows = fitted(texts)
    assert rows.dtype == np.float32 and rows.shape[0] == len(texts) and rows.shape[1] >= 1
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-4) | (lengths == 0))
    np.testing.assert_array_equal(embedder.embed(texts), rows)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, st.integers(0, 3))
def test_the_same_seed_gives_the_same_bits_and_state_restores_them(texts: list[str], seed: int) -> None:
    embedder, rows = fitted(texts, seed)
    again, same = fitted(texts, seed)
    np.testing.assert_array_equal(rows, same)
    assert again.identity == embedder.identity
    restored = Lsa(EmbedderContext(seed=seed))
    restored.restore(embedder.state())
    np.testing.assert_array_equal(restored.embed(texts), embedder.embed(texts))


def test_equal_texts_embed_equally_and_unlike_texts_do_not(rows: list[Row]) -> None:
    texts = [row.prompt for row in rows]
    _, embedded = fitted([*texts, *texts[:10]])
    np.testing.assert_allclose(embedded[len(texts) :], embedded[:10], atol=1e-5)
    assert np.abs(embedded[:50] @ embedded[50:100].T).min() < 0.5


def test_a_text_of_unknown_terms_is_a_zero_row() -> None:
    embedder, _ = fitted(["alpha beta", "beta gamma", "gamma alpha"])
    assert not embedder.embed(["omega"]).any()


def test_lsa_says_when_it_is_used_before_fit() -> None:
    with pytest.raises(RuntimeError, match="after fit"):
        Lsa(EmbedderContext()).embed(["a"])


def test_normalise_leaves_zero_rows_alone() -> None:
    rows = normalise(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert rows.dtype == np.float32


# ── features ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_normalised_and_follow_the_pool(rows: list[Row]) -> None:
    features = Features(pool_from_rows(rows), shots=Shots(tuple(rows[:4])))
    embeddings = features.embeddings()
    assert embeddings.dtype == np.float32 and len(embeddings) == len(rows)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(features.shot_embeddings(), embeddings[:4], atol=1e-5)
    assert {"embeddings", "shot embeddings"} <= features.timings.keys() == features.spent.keys()


def test_neighbours_share_the_skill(rows: list[Row]) -> None:
    embeddings = Features(pool_from_rows(rows)).embeddings()
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -1)
    assert np.mean([rows[i].skill == rows[j].skill for i, j in enumerate(cosines.argmax(axis=1))]) > 0.9


def test_a_hit_in_the_cache_equals_the_computation(rows: list[Row], tmp_path: Path) -> None:
    pool, shots = pool_from_rows(rows), Shots(tuple(rows[:4]))

    def everything(cache: Path | None, progress: Said) -> list[Any]:
        features = Features(pool, shots=shots, cache=cache, progress=progress)
        clusters = features.clusters()
        parts = [features.embeddings(), features.shot_embeddings(), features.lengths()]
        return [*parts, clusters.labels, clusters.centroids, np.array([t for ts in clusters.terms for t in ts])]

    said = Said()
    made, first = everything(None, said), everything(tmp_path, said)
    read = everything(tmp_path, hit := Said())
    for a, b, c in zip(made, first, read, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, c)
    assert said.messages and not hit.messages
    assert isinstance(read[0], np.memmap) and not read[0].flags.writeable


def test_new_shots_do_not_fit_again(rows: list[Row], tmp_path: Path) -> None:
    pool = pool_from_rows(rows)
    first = Features(pool, cache=tmp_path).embeddings()
    said = Said()
    features = Features(pool, shots=Shots(tuple(rows[7:9])), cache=tmp_path, progress=said)
    np.testing.assert_allclose(features.shot_embeddings(), first[7:9], atol=1e-5)
    assert not said.messages


@pytest.mark.parametrize("change", ["pool", "field", "seed", "embedder"])
def test_what_changes_the_embeddings_changes_the_key(rows: list[Row], change: str) -> None:
    pool = pool_from_rows(rows[1:] if change == "pool" else rows)
    options = FeatureOptions(embed_field="both" if change == "field" else "prompt")
    one, other = Features(pool_from_rows(rows)), Features(pool, options, seed=int(change == "seed"))
    if change == "embedder":
        other._embedder.identity  # noqa: B018
        other.__dict__["_embedder"] = _Named()
    assert one._embedding_key != other._embedding_key


class _Named:
    identity = "another/1"


@pytest.mark.parametrize("damage", ["cut", "header", "index", "missing", "swapped"])
def test_a_damaged_cache_is_seen_and_made_again(rows: list[Row], tmp_path: Path, damage: str) -> None:
    pool = pool_from_rows(rows)
    expected = np.array(Features(pool, cache=tmp_path).embeddings())
    (entry,) = tmp_path.glob("embeddings-*")
    target = entry / "rows.npy"
    content = target.read_bytes()
    if damage == "cut":
        target.write_bytes(content[:-8])
    elif damage == "header":
        target.write_bytes(b"\x00" * 64 + content[64:])
    elif damage == "index":
        (entry / "entry.json").write_text('{"arrays"', encoding="utf-8")
    elif damage == "missing":
        target.unlink()
    else:
        np.save(target, np.zeros((len(expected) * 2, expected.shape[1] // 2), np.float32))
    said = Said()
    np.testing.assert_array_equal(Features(pool, cache=tmp_path, progress=said).embeddings(), expected)
    assert any("damaged" in message for message in said.messages)
    np.testing.assert_array_equal(Features(pool, cache=tmp_path, progress=Said()).embeddings(), expected)


def test_fields(rows: list[Row]) -> None:
    pool = pool_from_rows(rows[:20])
    of = {field: Features(pool, FeatureOptions(embed_field=field)) for field in ("prompt", "response", "both")}
    assert [of["both"]._pool_texts()[0], of["response"]._pool_texts()[0]] == [
        f"{rows[0].prompt}\n{rows[0].response}",
        rows[0].response,
    ]
    shapes = {field: features.embeddings().shape[0] for field, features in of.items()}
    assert set(shapes.values()) == {20}


@pytest.mark.parametrize(
    "prompts", [["only one"], [""], ["", "", ""], ["same"] * 5, ["…", "日本語のテキスト", "1 + 1"]]
)
def test_odd_pools(prompts: list[str]) -> None:
    features = Features(pool_of(*prompts))
    assert features.embeddings().shape[0] == len(prompts)
    clusters = features.clusters()
    assert len(clusters.labels) == len(prompts) and clusters.sizes.sum() == len(prompts) and clusters.sizes.min() > 0
    assert features.lengths().tolist() == [math.ceil(2.6) + 1] * len(prompts)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(BadInput, match="no rows"):
        Features(pool_from_rows([])).embeddings()


@pytest.mark.parametrize("shots", [None, Shots(())])
def test_no_shots_are_refused(shots: Shots | None) -> None:
    with pytest.raises(BadInput, match="--shots"):
        Features(pool_of("a", "b"), shots=shots).shot_embeddings()


def test_estimated_lengths_are_said_to_be_estimates() -> None:
    assert estimate_tokens(["", "one", "one two three"]).tolist() == [1, 3, 5]
    assert "estimated" in Features(pool_of("a")).lengths_unit


def test_lengths_of_a_base_count_its_tokens(tiny_base: Path, rows: list[Row], tmp_path: Path) -> None:
    from xpert.language_model import answer_lengths, load_tokenizer

    features = Features(pool_from_rows(rows), FeatureOptions(base=str(tiny_base)), cache=tmp_path)
    expected = answer_lengths(load_tokenizer(str(tiny_base)), [row.response for row in rows])
    np.testing.assert_array_equal(features.lengths(), expected)
    assert features.lengths().dtype == np.int64 and str(tiny_base) in features.lengths_unit
    assert len(list(tmp_path.glob("lengths-*"))) == 1


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("lsaa", NotFound, "unknown embedder 'lsaa'. Did you mean 'lsa'?"),
        ("mini-lm", NotFound, "'minilm'"),
        ("", NotFound, "unknown embedder"),
        ("lsa:3", BadInput, "takes no argument"),
        ("minilm:x", BadInput, "takes no argument"),
        ("lm", BadInput, "--base"),
        ("lm:x", BadInput, "--base"),
        ("st", BadInput, "st:FOLDER"),
        ("st:", BadInput, "st:FOLDER"),
    ],
)
def test_mistakes_in_the_embedder(spec: str, error: type[BadInput], message: str) -> None:
    with pytest.raises(error) as caught:
        open_embedder(spec)
    assert message in str(caught.value)


def test_an_embedder_that_breaks_its_contract_is_refused() -> None:
    class Wrong(_Named):
        def fit(self, texts: Sequence[str]) -> None: ...

        def embed(self, texts: Sequence[str], progress: Any = None) -> Any:
            return np.full((len(texts), 2), np.nan, np.float32)

    features = Features(pool_of("a", "b"), cache=None)
    features.__dict__["_embedder"] = Wrong()
    with pytest.raises(ValueError, match="not finite"):
        features.embeddings()


def test_an_embedder_of_others_that_only_fits_is_fitted_once() -> None:
    class Counts(_Named):
        fits = 0

        def fit(self, texts: Sequence[str]) -> None:
            self.fits += 1

        def embed(self, texts: Sequence[str], progress: Any = None) -> Any:
            return np.ones((len(texts), 1), np.float32)

    embedder = Counts()
    assert not isinstance(embedder, FittedEmbedder)
    features = Features(pool_of("a", "b"), shots=Shots((Row("s", (Message("user", "a"),), "b"),)), cache=None)
    features.__dict__["_embedder"] = embedder
    features.embeddings(), features.shot_embeddings()
    assert embedder.fits == 1
