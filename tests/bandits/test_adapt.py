"""adapt: the scorer of each cluster, even coverage of its scores, pruning, exact budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.clustering import Clusters
from xpert.data import pool_from_rows
from xpert.errors import BadInput, NotFound
from xpert.features import FeatureOptions, Features
from xpert.protocols import Selection
from xpert.records import Budget, Message, Row
from xpert.selection import choose
from xpert.selectors import adapt
from xpert.selectors.adapt import covering_bins, nearest_earlier, spread_entropy

unhurried = settings(max_examples=30, deadline=None)


class Scores:
    """A scorer whose scores are given."""

    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, np.asarray(values, np.float32)

    def score(self, rows: Any) -> Any:
        return self.values[rows]

    def explain(self, row: int) -> str:
        return f"{self.name} {self.values[row]:.2f}"


class Given:
    lengths_unit = "tokens"

    def __init__(self, labels: Any, embeddings: Any = None, lengths: Any = None) -> None:
        self.labels = np.asarray(labels, np.int32)
        self._embeddings = np.eye(len(labels), 4, dtype=np.float32) if embeddings is None else embeddings
        self._lengths = np.ones(len(labels), np.int64) if lengths is None else np.asarray(lengths, np.int64)
        self.pool = pool_from_rows([Row(f"r{i}", (Message("user", f"p{i}"),), "a") for i in range(len(labels))])

    def embeddings(self) -> Any:
        return self._embeddings

    def clusters(self) -> Clusters:
        many = int(self.labels.max()) + 1
        return Clusters(self.labels, np.eye(many, dtype=np.float32), [[] for _ in range(many)])

    def lengths(self) -> Any:
        return self._lengths


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Selection]:
    """`run(features, {scorer: scores}, budget, **params)`, clustered by embeddings."""

    def run(features: Any, scores: dict[str, Any], budget: str, *, seed: int = 0, **params: Any) -> Selection:
        monkeypatch.setattr(adapt, "prepared_scorer", lambda name, *_: Scores(name, scores[name]))
        plugin = plugins.load("selector", "adapt")
        options = plugin.Options.from_mapping({"scorers": tuple(scores), "cluster_by": "embeddings", **params})
        return choose(plugin(options), features, None, Budget.parse(budget), seed=seed)

    return run


def test_each_cluster_gets_the_scorer_that_spreads_it(run: Callable[..., Selection]) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    flat, peaked = rng.uniform(size=600), np.where(rng.random(600) < 0.02, 100.0, rng.normal(size=600) * 0.01)
    scores = {"length": np.where(labels == 0, flat, peaked), "complexity": np.where(labels == 0, peaked, flat)}
    found = run(Given(labels), scores, "100")
    chosen = {entry["cluster"]: entry["scorer"] for entry in found.log if entry["step"] == "cluster"}
    assert chosen == {0: "length", 1: "complexity"}
    assert np.bincount(labels[found.rows]).tolist() == [50, 50]
    first = int(found.rows[0])
    name = "length" if labels[first] == 0 else "complexity"
    assert found.reasons[0] == f"{name} {scores[name][first]:.2f}; cluster {labels[first]} by {name}"


def test_entropy_in_known_cases() -> None:
    assert spread_entropy(np.zeros(10), 50) == 0
    assert spread_entropy(np.array([-1.0, 1.0, np.nan]), 50) == 1
    assert spread_entropy(np.repeat([-3.9, -1.0, 1.0, 9.0], 5), 50) == 2
    assert spread_entropy(np.array([np.nan]), 50) == 0
    even = np.linspace(-4, 4, 5001)[:-1] + 1e-6
    assert spread_entropy(even, 50) == pytest.approx(math.log2(50), abs=1e-3)


@given(values=st.lists(st.floats(-10, 10, width=32), max_size=60), cut=st.sampled_from([0, 0.05, 0.2, 0.49]))
@unhurried
def test_bins_equal_the_plain_form(values: list[float], cut: float) -> None:
    core, bins = covering_bins(np.array(values), cut, 7)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    gone = int(cut * len(values))
    plain = order[gone : len(values) - gone]
    assert core.tolist() == plain
    if plain:
        low, high = values[plain[0]], values[plain[-1]]
        for index, place in zip(plain, bins.tolist(), strict=True):
            if high > low:
                assert 0 <= place <= 6
                assert low + place * (high - low) / 7 <= values[index] + 1e-9
                assert values[index] <= low + (place + 1) * (high - low) / 7 + 1e-9
            else:
                assert place == 0


def test_all_of_the_range_is_covered(run: Callable[..., Selection]) -> None:
    """Scores crowd near 0; an even draw over bins reaches the thin upper part as well, and not the tails."""
    rng = np.random.default_rng(1)
    scores = rng.exponential(size=2000)
    found = run(Given(np.zeros(2000, int)), {"length": scores}, "100", bins=10)
    low, high = np.sort(scores)[[100, 1899]]
    assert low <= scores[found.rows].min()
    assert scores[found.rows].max() <= high
    counts, _ = np.histogram(scores[found.rows], bins=10, range=(low, high))
    assert counts.tolist() == [10] * 10


def test_small_clusters_and_bins_leave_their_part_to_others(run: Callable[..., Selection]) -> None:
    labels = np.repeat([0, 1, 2], [2, 8, 90])
    found = run(Given(labels), {"length": np.arange(100.0)}, "60", cut=0, bins=5)
    assert np.bincount(labels[found.rows]).tolist() == [2, 8, 50]


def test_what_is_left_out_comes_last(run: Callable[..., Selection]) -> None:
    scores = np.arange(40.0)
    scores[[3, 4]] = np.nan
    features = Given(np.zeros(40, int), np.tile(np.eye(20, dtype=np.float32), (2, 1)))
    found = run(features, {"length": scores}, "40", cut=0.1, keep="20")
    places = {int(row): place for place, row in enumerate(found.rows)}
    assert sorted(places) == list(range(40))
    assert {row for row, place in places.items() if place >= 20} == set(range(20, 40))  # repeats of the first 20
    assert {row for row, place in places.items() if place in (18, 19)} == {3, 4}
    assert {row for row, place in places.items() if place in (16, 17)} == {0, 19}  # the cut ends of 18 rows
    assert found.reasons[places[3]].startswith("not scored: length nan")
    assert "beyond its cut" in found.reasons[places[0]]
    assert found.reasons[-1] == "brought back from those pruned; cluster 0"
    assert np.isfinite(found.scores).all()


@given(seed=st.integers(0, 200), rows=st.integers(1, 25), block=st.integers(1, 8))
@unhurried
def test_nearest_earlier_equals_the_plain_form(seed: int, rows: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = rng.permutation(30)[:rows]
    found = nearest_earlier(vectors, chosen, block=block)
    plain = [
        max((float(vectors[row] @ vectors[other]) for other in chosen[:place]), default=-2.0)
        for place, row in enumerate(chosen)
    ]
    np.testing.assert_allclose(found, plain, atol=2e-6)


def test_pruning_drops_repeats_and_lists_them(run: Callable[..., Selection]) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    features = Given(np.tile([0, 1], 60), np.concatenate([vectors, vectors]))
    found = run(features, {"length": np.arange(120.0)}, "50", keep="50%")
    last = found.log[-1]
    assert (last["step"], last["kept"], last["dropped"]) == ("pruned", 60, 60)
    assert last["ids"] == [f"r{row}" for row in range(60, 120)]
    assert found.rows.max() < 60
    assert run(features, {"length": np.arange(120.0)}, "50").log[-1]["ids"] == []


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    part=st.floats(0.02, 1),
    seed=st.integers(0, 99),
    keep=st.sampled_from(["100%", "60%", "1"]),
    kind=st.sampled_from(["apart", "equal", "gaps", "none"]),
)
@unhurried
def test_budgets_are_hit_whatever_the_pool(sizes: list[int], part: float, seed: int, keep: str, kind: str) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = len(labels)
    scores = np.full(count, 0.1) if kind == "equal" else rng.normal(size=count)
    scores[:: {"gaps": 3, "none": 1}.get(kind, count + 1)] = np.nan
    if kind in ("apart", "equal"):
        scores = np.nan_to_num(scores, nan=0.1)
    features = Given(labels, lengths=rng.integers(1, 20, count))
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(adapt, "prepared_scorer", lambda name, *_: Scores(name, scores))
        plugin = plugins.load("selector", "adapt")
        selector = plugin(plugin.Options(scorers=("length", "complexity"), cluster_by="embeddings", keep=keep, bins=4))
        wanted = max(1, round(part * count))
        found = choose(selector, features, None, Budget.parse(str(wanted)), seed=seed)
        assert len(set(found.rows.tolist())) == wanted
        assert np.isfinite(found.scores).all()
        total = int(features.lengths().sum())
        limit = max(int(features.lengths().min()), round(part * total))
        taken = choose(selector, features, None, Budget.parse(f"{limit}tok"), seed=seed).rows
    left = limit - int(features.lengths()[taken].sum())
    assert left >= 0
    assert not any(features.lengths()[row] <= left for row in range(count) if row not in set(taken.tolist()))


def test_clusters_of_gradients(rows: list[Row], tiny_base: Path) -> None:
    options = FeatureOptions(base=str(tiny_base), clusters="3", max_length=128)
    features = Features(pool_from_rows(rows[:40]), options, cache=None, device="cpu")
    plugin = plugins.load("selector", "adapt")
    found = choose(plugin(plugin.Options(scorers=("el2n", "perplexity"))), features, None, Budget.parse("12"))
    clusters = [entry for entry in found.log if entry["step"] == "cluster"]
    assert len(clusters) == 3
    assert sum(entry["taken rows"] for entry in clusters) == 12
    assert all(set(entry["entropies"]) == {"el2n", "perplexity"} for entry in clusters)
    assert "embeddings" not in features.timings
    assert "gradients" in features.timings


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scorers": "perplexity,el2m"}, "Did you mean 'el2n'"),
        ({"scorers": "length,length"}, "one twice"),
        ({"scorers": ()}, "names none"),
        ({"keep": "10ktok"}, "rows are pruned"),
        ({"cluster_by": "gradient"}, "gradients"),
        ({"cut": 0.5}, "the most is 0.49"),
    ],
)
def test_mistakes_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInput, NotFound)) as caught:
        plugins.load("selector", "adapt").Options.from_mapping(params)
    assert message in f"{caught.value} {caught.value.hint}"
