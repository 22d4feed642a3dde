"""kmq-iterative: weights, rounds, budgets, and the model that scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.answer_losses import AnswerLosses
from xpert.clustering import Clusters
from xpert.data import pool_from_rows
from xpert.errors import BadInput, NotFound
from xpert.features import FeatureOptions, Features
from xpert.lora_training import LoraOptions
from xpert.merged_model import write_merged
from xpert.model_files import model_fingerprint
from xpert.protocols import Selection
from xpert.records import Budget, Message, Row
from xpert.selection import choose
from xpert.selectors import kmq_iterative
from xpert.selectors._training import adapters, by_base, trained_base
from xpert.selectors.kmq_iterative import reweighted

unhurried = settings(max_examples=40, deadline=None)


class Given:
    lengths_unit = "tokens"
    options = FeatureOptions(base="base")

    def __init__(self, labels: Any, lengths: Any = None) -> None:
        self.labels = np.asarray(labels, np.int32)
        self._lengths = np.ones(len(labels), np.int64) if lengths is None else np.asarray(lengths, np.int64)
        self.pool = pool_from_rows([Row(f"r{i}", (Message("user", f"p{i}"),), "a") for i in range(len(labels))])

    def base(self) -> str:
        return "base"

    def clusters(self) -> Clusters:
        many = int(self.labels.max()) + 1
        return Clusters(self.labels, np.eye(many, dtype=np.float32), [[] for _ in range(many)])

    def lengths(self) -> Any:
        return self._lengths


class Behind:
    """A progress score that is given by row; it remembers what it was asked, and with which base."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float32)
        self.asked: list[list[int]] = []
        self.bases: list[str] = []

    def score(self, rows: Any) -> Any:
        self.asked.append(rows.tolist())
        return self.values[rows]

    def explain(self, row: int) -> str:
        return "behind"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Selection, Behind, list[list[str]]]]:
    """Training and the progress score are stand-ins; gives also the score, and the ids of the rows of each training."""

    def run(
        features: Any, values: Any, budget: str, *, seed: int = 0, **params: Any
    ) -> tuple[Selection, Behind, list[list[str]]]:
        behind, trained = Behind(values), []

        @contextmanager
        def train(_: Any, rows: Sequence[Row], options: LoraOptions) -> Iterator[str]:
            trained.append([row.id for row in rows])
            yield f"base trained {len(trained)} times"

        def prepared(name: str, parameters: str, view: Any, *_: Any) -> Behind:
            behind.bases.append(view.base())
            return behind

        monkeypatch.setattr(kmq_iterative, "prepared_scorer", prepared)
        plugin = plugins.load("selector", "kmq-iterative")
        monkeypatch.setattr(plugin, "train", staticmethod(train))
        found = choose(plugin(plugin.Options.from_mapping(params)), features, None, Budget.parse(budget), seed=seed)
        return found, behind, trained

    return run


def taken(found: Selection, number: int) -> dict[int, int]:
    return {entry["cluster"]: entry["taken rows"] for entry in found.log if entry["round"] == number}


def weights(found: Selection, number: int) -> list[float]:
    return [entry["weight"] for entry in found.log if entry["round"] == number]


def test_clusters_that_are_behind_are_given_more(run: Callable[..., Any]) -> None:
    labels = np.repeat([0, 1, 2], 200)
    found, behind, trained = run(Given(labels), np.log([1.0, 2.0, 3.0])[labels], "180")
    assert weights(found, 1) == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert weights(found, 2) == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=1e-5)
    assert weights(found, 3) == pytest.approx([1 / 14, 4 / 14, 9 / 14], abs=1e-5)
    assert taken(found, 1) == {0: 20, 1: 20, 2: 20}
    assert taken(found, 2) == {0: 10, 1: 20, 2: 30}
    assert taken(found, 3) == {0: 4, 1: 17, 2: 39}
    assert behind.bases == ["base trained 1 times", "base trained 2 times"]
    assert [len(rows) for rows in trained] == [60, 120]
    assert trained[1] == [f"r{row}" for row in found.rows[:120]]
    assert behind.asked == [found.rows[:60].tolist(), found.rows[60:120].tolist()]
    assert found.reasons[60].startswith("round 2, cluster")


@pytest.mark.parametrize("budget", ["90", "700tok"])
def test_one_round_is_kmq_with_equal_shares(budget: str, run: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    features = Given(rng.permutation(np.repeat(np.arange(5), [3, 10, 40, 60, 90])), rng.integers(1, 30, 203))
    found, behind, trained = run(features, np.zeros(203), budget, rounds=1)
    kmq = plugins.load("selector", "kmq")
    plain = choose(kmq(kmq.Options(share="equal")), features, None, Budget.parse(budget), seed=0)
    assert found.rows.tolist() == plain.rows.tolist()
    assert not behind.asked
    assert not trained


def test_temperature(run: Callable[..., Any]) -> None:
    labels = np.repeat([0, 1], 100)
    values = np.log([1.0, 4.0])[labels]
    assert weights(run(Given(labels), values, "40", temp=2, rounds=2)[0], 2) == pytest.approx([1 / 3, 2 / 3], abs=1e-5)
    assert weights(run(Given(labels), values, "40", temp=1e6, rounds=2)[0], 2) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_a_short_cluster_leaves_its_part_to_the_others(run: Callable[..., Any]) -> None:
    labels = np.repeat([0, 1, 2], [4, 100, 100])
    found, _, _ = run(Given(labels), np.zeros(204), "90")
    assert taken(found, 1) == {0: 4, 1: 13, 2: 13}
    assert taken(found, 2) == {0: 0, 1: 15, 2: 15}
    assert len(set(found.rows.tolist())) == 90


def test_a_cluster_without_a_drawn_row_keeps_its_weight(run: Callable[..., Any]) -> None:
    """One row a round over four clusters: only the cluster drawn could move, and alone it stays as it is."""
    labels = np.repeat([0, 1, 2, 3], 5)
    found, _, _ = run(Given(labels), labels * 1.0, "3")
    assert all(weights(found, number) == [0.25] * 4 for number in (1, 2, 3))
    found, _, _ = run(Given(labels), np.where(labels == 0, np.nan, labels), "8", rounds=2)
    moved = weights(found, 2)
    assert moved[0] == 0.25
    assert sum(moved) == pytest.approx(1, abs=1e-5)
    assert moved[3] > moved[2] > moved[1]


@given(
    parts=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    means=st.lists(st.one_of(st.floats(-1e4, 1e4), st.just(float("nan"))), min_size=6, max_size=6),
    temp=st.floats(0.01, 100),
)
@unhurried
def test_weights_stay_weights(parts: list[float], means: list[float], temp: float) -> None:
    before = np.array(parts) / np.sum(parts)
    given_means = np.array(means[: len(parts)])
    after = reweighted(before, given_means, temp)
    assert np.isfinite(after).all()
    assert (after >= 0).all()
    assert after.sum() == pytest.approx(1)
    unknown = ~np.isfinite(given_means)
    assert after[unknown].tolist() == before[unknown].tolist()
    assert after[~unknown].sum() == pytest.approx(before[~unknown].sum())


@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    part=st.floats(0.02, 1),
    rounds=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@unhurried
def test_budgets_are_hit(sizes: list[int], part: float, rounds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = len(labels)
    features = Given(labels, rng.integers(1, 20, count))
    plugin = plugins.load("selector", "kmq-iterative")

    @contextmanager
    def train(*_: Any) -> Iterator[str]:
        yield "trained"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kmq_iterative, "prepared_scorer", lambda *_: Behind(rng.normal(size=count)))
        patched.setattr(plugin, "train", staticmethod(train))
        selector = plugin(plugin.Options(rounds=rounds))
        wanted = max(1, round(part * count))
        found = choose(selector, features, None, Budget.parse(str(wanted)), seed=seed)
        assert len(set(found.rows.tolist())) == wanted
        limit = max(int(features.lengths().min()), round(part * int(features.lengths().sum())))
        rows = choose(selector, features, None, Budget.parse(f"{limit}tok"), seed=seed).rows
    left = limit - int(features.lengths()[rows].sum())
    assert left >= 0
    assert not any(features.lengths()[row] <= left for row in range(count) if row not in set(rows.tolist()))


def test_quality_decides_inside_a_cluster(run: Callable[..., Any]) -> None:
    values = np.arange(400) / 100.0
    plain, _, _ = run(Given(np.zeros(400, int)), values, "100", rounds=1)
    liked, _, _ = run(Given(np.zeros(400, int)), values, "100", rounds=1, quality="length")
    assert values[liked.rows].mean() > values[plain.rows].mean() + 0.3
    unknown = np.where(np.arange(400) < 200, np.nan, 1.0)
    found, _, _ = run(Given(np.zeros(400, int)), unknown, "220", rounds=1, quality="length")
    assert set(range(200, 400)) <= set(found.rows.tolist())


def test_the_model_trained_so_far_is_the_one_that_scores(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    """A base trained on rows finds them less surprising; its folder is gone afterwards, its adapter is kept."""
    options = FeatureOptions(base=str(tiny_base), max_length=128)
    features = Features(pool_from_rows(rows[:16]), options, cache=tmp_path, device="cpu")
    every = np.arange(16)
    before = features.compute(AnswerLosses(features.base(), 128), every)["nll"].mean()
    settings = LoraOptions(epochs=8, learning_rate=5e-3, batch_size=4, dropout=0.0)
    with trained_base(features, rows[:16], settings) as base:
        view = by_base(features, base)
        assert view.base() == base
        assert len(view.pool) == 16
        after = view.compute(AnswerLosses(view.base(), 128), every)["nll"].mean()
        merged = model_fingerprint(base)
    assert after < before - 0.3
    with adapters(features, rows[:16], settings) as checkpoints:
        last = write_merged(features.base(), checkpoints[-1], tmp_path / "last", device="cpu")
    assert model_fingerprint(str(last)) == merged
    assert not Path(base).exists()
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_untrained_it_scores_as_the_base(rows: list[Row], tiny_base: Path) -> None:
    features = Features(pool_from_rows(rows[:8]), FeatureOptions(base=str(tiny_base)), cache=None, device="cpu")
    every = np.arange(8)
    before = features.compute(AnswerLosses(features.base(), 128), every)["nll"]
    with trained_base(features, (), LoraOptions()) as base:
        after = by_base(features, base).compute(AnswerLosses(base, 128), every)["nll"]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"progress": "perplexty"}, "Did you mean 'perplexity'"),
        ({"progress_params": "order=up"}, "order"),
        ({"quality": "deita"}, "scorer"),
        ({"rounds": 0}, "the least is 1"),
        ({"temp": 0.0}, "the least is"),
    ],
)
def test_mistakes_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInput, NotFound)) as caught:
        plugins.load("selector", "kmq-iterative").Options.from_mapping(params)
    assert message in f"{caught.value} {caught.value.hint}"
