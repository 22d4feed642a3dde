"""Clusters: every row in one, none empty, the same for the same seed, and named by what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.cluster_folder import cluster_pool, read_clusters
from xpert.clustering import _fill_empty, cluster, cluster_count, telling_terms
from xpert.data import pool_from_rows
from xpert.embedding import normalise
from xpert.errors import BadInput, Corrupt
from xpert.features import FeatureOptions, Features
from xpert.protocols import Floats
from xpert.records import Row


def blobs(seed: int, count: int, centres: int, spread: float = 0.05, d: int = 8) -> tuple[Floats, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    middle = normalise(rng.normal(size=(centres, d)))
    of = rng.integers(0, centres, count)
    return normalise(middle[of] + spread * rng.normal(size=(count, d))), of


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 60), st.floats(0, 1))
def test_labels_cover_and_no_cluster_is_empty(seed: int, n: int, k: int, repeated: float) -> None:
    rows, _ = blobs(seed, n, 5)
    copies = int(repeated * n)
    rows[:copies] = rows[0]
    k = min(k, len(np.unique(rows, axis=0)))
    labels, centroids = cluster(rows, k, seed=seed)
    assert labels.dtype == np.int32 and centroids.shape == (k, rows.shape[1]) and centroids.dtype == np.float32
    assert set(labels.tolist()) == set(range(k))
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    again, same = cluster(rows, k, seed=seed)
    np.testing.assert_array_equal(labels, again)
    np.testing.assert_array_equal(centroids, same)


def test_blobs_are_found() -> None:
    rows, of = blobs(3, 600, 4)
    labels, _ = cluster(rows, 4, seed=1)
    pure = sum(np.bincount(of[labels == c]).max() for c in range(4))
    assert pure >= 590


def test_an_empty_cluster_takes_from_the_biggest() -> None:
    rows, _ = blobs(0, 40, 2)
    centroids = normalise(np.stack([rows[:30].mean(axis=0), rows[30:].mean(axis=0), np.ones(8)]))
    labels = np.repeat([0, 1], [30, 10]).astype(np.int32)
    filled, moved = _fill_empty(rows, labels.copy(), centroids.copy(), np.einsum("ij,ij->i", rows, centroids[labels]))
    assert set(filled.tolist()) == {0, 1, 2} and (filled[30:] == 1).all()
    assert not np.array_equal(moved[2], centroids[2])


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 1), (50, 5), (20_000, 100)])
def test_auto_is_the_root_of_half_the_rows(n: int, expected: int) -> None:
    assert cluster_count("auto", np.arange(n, dtype=np.float32)[:, None]) == expected


def test_auto_stays_within_the_different_rows() -> None:
    assert cluster_count("auto", np.zeros((200, 2), np.float32)) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("0", "the least is 1"),
        ("-1", "the least is 1"),
        ("7", "the pool holds 6 rows"),
        ("4", "only 3 rows of the pool embed differently. Write at most 3"),
        ("many", "write a whole number, or auto"),
        ("2.5", "write a whole number, or auto"),
        ("", "write a whole number, or auto"),
    ],
)
def test_numbers_of_clusters_that_make_no_sense(setting: str, message: str) -> None:
    rows = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
    with pytest.raises(BadInput) as caught:
        cluster_count(setting, rows)
    assert message.lower() in str(caught.value).lower()


def test_terms_tell_clusters_apart_and_do_not_repeat() -> None:
    texts = ["add the two large numbers", "translate this word into french"] * 30
    terms = telling_terms(texts, np.array([0, 1] * 30, np.int32), 2)
    assert any("numbers" in term for term in terms[0]) and any("french" in term for term in terms[1])
    for own in terms:
        said: set[str] = set()
        for term in own:
            assert not set(term.split()) <= said
            said |= set(term.split())


def test_texts_without_words_have_no_terms() -> None:
    assert telling_terms(["1 + 1", ""], np.array([0, 1], np.int32), 2) == [[], []]


def test_clusters_follow_the_skills(rows: list[Row]) -> None:
    clusters = Features(pool_from_rows(rows), FeatureOptions(clusters="5")).clusters()
    skills = np.array([row.skill for row in rows])
    pure = sum(np.unique(skills[clusters.labels == c], return_counts=True)[1].max() for c in range(5))
    assert pure > 0.8 * len(rows)


# ── the artifact and the command ─────────────────────────────────────────────────────────────────────────────────


def test_the_artifact_reads_back_and_is_recognised(rows: list[Row], tmp_path: Path) -> None:
    pool, out = pool_from_rows(rows), tmp_path / "clusters"
    made = cluster_pool(pool, out=out, features=FeatureOptions(clusters="4"))
    expected = Features(pool, FeatureOptions(clusters="4")).clusters()
    np.testing.assert_array_equal(made.clusters.labels, expected.labels)
    assert made.clusters.terms == expected.terms
    lines = [json.loads(line) for line in (out / "clusters.jsonl").read_text().splitlines()]
    assert sum(line["size"] for line in lines) == len(rows)
    assert [line["size"] for line in lines] == sorted((line["size"] for line in lines), reverse=True)
    assert all(made.clusters.labels[row] == line["cluster"] for line in lines for row in line["central_rows"])
    page = (out / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and lines[0]["terms"][0] in page
    before = (out / "manifest.json").stat().st_mtime_ns
    cluster_pool(pool, out=out, features=FeatureOptions(clusters="4"))
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="another pool, or by other options"):
        cluster_pool(pool, out=out, features=FeatureOptions(clusters="3"))
    (out / "labels.npy").write_bytes(b"broken")
    with pytest.raises(Corrupt, match="Cluster again"):
        read_clusters(out)


def test_the_command(
    xpert: Callable[..., Result], write_jsonl: Callable[..., Path], columns: Callable[..., Any], tmp_path: Path
) -> None:
    pool = write_jsonl("pool.jsonl", columns(60))
    result = xpert("cluster", pool, "-o", tmp_path / "out", "--clusters", 3, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["clusters"] == 3 and sum(c["size"] for c in value["biggest_clusters"]) == value["rows"]
    assert not result.stderr
    text = xpert("cluster", pool, "-o", tmp_path / "out", "--clusters", 3)
    assert text.exit_code == 0 and "3 clusters" in text.stdout and "already" in text.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clusters", "0"), "least is 1"),
        (("--clusters", "-1"), "least is 1"),
        (("--clusters", "9999"), "the pool holds"),
        (("--clusters", "some"), "or auto"),
        (("--embedder", "lsaa"), "Did you mean 'lsa'?"),
        (("--embedder", "lm"), "--base"),
        (("--embed-field", "promt"), "'prompt'"),
    ],
)
def test_mistakes_end_in_one_line(
    xpert: Callable[..., Result],
    write_jsonl: Callable[..., Path],
    columns: Callable[..., Any],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    pool = write_jsonl("pool.jsonl", columns(30))
    result = xpert("cluster", pool, "-o", tmp_path / "out", "--quiet", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
