"""One suite that every selector passes: exact budgets, no repeats, the same rows again, whatever the blocks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.clustering import Clusters
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.protocols import Selection
from xpert.records import Budget, Message, Row, Shots
from xpert.selection import choose

# Those that read rows with a model have a suite of their own (test_model_selectors.py), and so has the one that learns
# from judgements (test_qurating.py).
PLAIN = [
    name
    for name in plugins.names("selector")
    if not plugins.load("selector", name).needs & {"base", "judge"} and name != "qurating"
]
# Settings beside the defaults that are methods of their own.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in PLAIN] + [
    ("facility", {"mode": "exact"}),
    ("facility", {"mode": "blocks"}),
    ("facility", {"mode": "sparse", "neighbours": 5}),
    ("facility", {"mode": "shots"}),
    ("facility", {"similarity": "shifted"}),
    ("dpp", {"ridge": 0.0}),
    ("dpp", {"quality": "length"}),
    ("dsir", {"gumbel": False, "min_words": 3}),
    ("ideal", {"p": 0.5, "samples": 5, "neighbours": 3}),
    ("kcenter", {"start": "medoid"}),
    ("kmq", {"quality": "shots", "share": "equal"}),
    ("kmq", {"quality": "length"}),
    ("kshot", {"order": "nearest"}),
    ("kshot", {"order": "mean", "tau": 0.3, "reach": 100.0}),
    ("qdit", {"quality": "similarity", "alpha": 0.2, "similarity": "shifted"}),
    ("qdit", {"quality": "similarity", "alpha": 1.0}),
    ("semdedup", {"keep": "easy", "eps": 0.2}),
    ("semdedup", {"keep": "random"}),
    ("votek", {"neighbours": 20}),
    ("votek", {"stage": "full", "uncertainty": "length"}),
    ("adapt", {"scorers": ("length", "complexity"), "cluster_by": "embeddings", "keep": "80%"}),
    ("quad", {"reward": "similarity"}),
    ("quad", {"reward": "similarity", "policy": "thompson", "claim": 5}),
    ("clusterucb", {"reward": "similarity"}),
    ("clusterucb", {"reward": "length", "policy": "thresh-hard", "evaluate": "50%"}),
]
every_selector = pytest.mark.parametrize(
    ("name", "params"), VARIANTS, ids=[" ".join([n, *(f"{k}={v}" for k, v in p.items())]) for n, p in VARIANTS]
)
# The draw follows a row's place, not its content.
DRAWN = {"random", "kmq", "dsir", "ideal", "adapt", "quad", "clusterucb"}
TIED = {"length", "complexity"}  # many rows score alike, and the lowest index goes first
unhurried = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def unit(rows: Any) -> Any:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0).astype(np.float32)


class Given:
    """Features that are given, not computed."""

    lengths_unit = "tokens"

    def __init__(self, embeddings: Any, shots: Any, lengths: Any) -> None:
        self._embeddings, self._shots, self._lengths = embeddings, shots, np.asarray(lengths, dtype=np.int64)
        rows = [Row(f"r{i}", (Message("user", f"prompt {i}"),), "answer") for i in range(len(embeddings))]
        self.pool = pool_from_rows(rows)
        self.shots = Shots(tuple(Row(f"s{i}", (Message("user", f"shot {i}"),), "yes") for i in range(len(shots))))

    def embeddings(self) -> Any:
        return self._embeddings

    def shot_embeddings(self) -> Any:
        return self._shots

    def lengths(self) -> Any:
        return self._lengths

    def clusters(self) -> Clusters:
        """By which of the axes 0..3 a row is nearest; every cluster that is named has a row."""
        _, labels = np.unique(self._embeddings[:, :4].argmax(axis=1), return_inverse=True)
        count = int(labels.max()) + 1
        return Clusters(labels.astype(np.int32), np.eye(count, 8, dtype=np.float32), [[] for _ in range(count)])


def make(rows: int, seed: int = 0, *, shots: int = 3) -> Given:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(5, 8))
    scattered = centres[random.integers(5, size=rows)] + 0.5 * random.normal(size=(rows, 8))
    return Given(unit(scattered), unit(centres[:shots] + 0.1), random.integers(1, 40, size=rows))


def run(
    name: str,
    params: dict[str, Any],
    features: Any,
    budget: str,
    *,
    seed: int = 0,
    block: int | None = None,
    excluded: Sequence[int] = (),
) -> Selection:
    plugin = plugins.load("selector", name)
    selector = plugin(plugin.Options(**params))
    if block is not None and hasattr(selector, "block"):
        selector.block = block
    return choose(selector, features, features.shots, Budget.parse(budget), seed=seed, excluded=excluded)


@every_selector
@unhurried
@given(rows=st.integers(1, 120), seed=st.integers(0, 1000), part=st.floats(0.01, 1))
def test_a_budget_is_hit_exactly(name: str, params: dict[str, Any], rows: int, seed: int, part: float) -> None:
    features = make(rows, seed)
    lengths = features.lengths()
    wanted = max(1, round(part * rows))
    found = run(name, params, features, str(wanted), seed=seed)
    assert len(found.rows) == len(set(found.rows.tolist())) == wanted
    assert len(found.scores) == len(found.reasons) == wanted
    assert all(found.reasons)

    share = f"{max(1, round(part * 100))}%"
    assert len(run(name, params, features, share, seed=seed).rows) == Budget.parse(share).limit(rows)

    tokens = max(int(lengths.min()), round(part * int(lengths.sum())))
    taken = run(name, params, features, f"{tokens}tok", seed=seed).rows
    left = tokens - int(lengths[taken].sum())
    assert left >= 0
    assert not any(lengths[row] <= left for row in range(rows) if row not in set(taken.tolist()))


@every_selector
def test_the_same_seed_gives_the_same_rows(name: str, params: dict[str, Any]) -> None:
    one, two = (run(name, params, make(150), "40", seed=7) for _ in range(2))
    assert one.rows.tolist() == two.rows.tolist()
    assert one.scores.tobytes() == two.scores.tobytes()
    assert list(one.reasons) == list(two.reasons)
    assert list(one.log) == list(two.log)


@every_selector
@unhurried
@given(seed=st.integers(0, 1000), block=st.integers(1, 50))
def test_blocks_make_no_difference(name: str, params: dict[str, Any], seed: int, block: int) -> None:
    features = make(90, seed)
    for budget in ("30", "400tok"):
        plain, blocked = run(name, params, features, budget), run(name, params, features, budget, block=block)
        assert plain.rows.tolist() == blocked.rows.tolist()
        np.testing.assert_allclose(plain.scores, blocked.scores, atol=1e-5)


@every_selector
@unhurried
@given(seed=st.integers(0, 1000))
def test_the_order_of_the_pool_does_not_matter(name: str, params: dict[str, Any], seed: int) -> None:
    features = make(80, seed)
    order = np.random.default_rng(seed).permutation(80)
    moved = Given(features.embeddings()[order], features.shot_embeddings(), features.lengths()[order])
    found, of_moved = run(name, params, features, "25", seed=seed), run(name, params, moved, "25", seed=seed)
    if name == "random":
        assert found.rows.tolist() == of_moved.rows.tolist()
    elif name == "facility":  # two rows that only cover each other tie, and the lower index differs
        assert found.scores.sum() == pytest.approx(of_moved.scores.sum(), rel=0.01)
    elif name in TIED:
        assert found.scores.tolist() == of_moved.scores.tolist()
    elif name == "votek":  # votes are whole numbers, and many rows have as many
        assert found.scores[0] == of_moved.scores[0]
    elif params.get("ridge") == 0:  # eight dimensions: no further row adds volume, and the lowest index goes first
        assert found.rows[:8].tolist() == order[of_moved.rows[:8]].tolist()
    elif name not in DRAWN and params.get("keep") != "random":
        assert found.rows.tolist() == order[of_moved.rows].tolist()


@every_selector
def test_excluded_rows_are_never_chosen(name: str, params: dict[str, Any]) -> None:
    features = make(60)
    found = run(name, params, features, "50", excluded=range(0, 60, 6))
    assert not set(found.rows.tolist()) & set(range(0, 60, 6))
    with pytest.raises(BadInput, match="the pool holds 50"):
        run(name, params, features, "51", excluded=range(0, 60, 6))


@every_selector
@pytest.mark.parametrize("vector", [np.eye(1, 8), np.zeros((1, 8))], ids=["all alike", "all empty"])
@pytest.mark.parametrize("rows", [1, 2, 450])
def test_pools_without_differences(name: str, params: dict[str, Any], vector: Any, rows: int) -> None:
    embeddings = np.repeat(vector, rows, axis=0).astype(np.float32)
    features = Given(embeddings, np.eye(2, 8, dtype=np.float32), np.full(rows, 3))
    for wanted in {1, rows // 2 or 1, rows}:
        found = run(name, params, features, str(wanted))
        assert len(set(found.rows.tolist())) == wanted
        assert np.isfinite(found.scores).all()


@every_selector
def test_a_budget_that_does_not_fit_is_refused(name: str, params: dict[str, Any]) -> None:
    features = Given(np.eye(4, 8, dtype=np.float32), np.eye(1, 8, dtype=np.float32), [5, 6, 7, 8])
    with pytest.raises(BadInput, match="pool holds 4"):
        run(name, params, features, "5")
    with pytest.raises(BadInput, match="pool holds 26"):
        run(name, params, features, "27tok")
    with pytest.raises(BadInput, match="less than the shortest row"):
        run(name, params, features, "4tok")


@every_selector
def test_what_a_method_needs_is_said(name: str, params: dict[str, Any]) -> None:
    plugin = plugins.load("selector", name)
    # With a scorer as a parameter, a method that reads rows with a model by default may do without.
    assert plugin.needs <= {"shots", "answers", "embeddings", "clusters", "lengths", *({"base"} if params else set())}
    assert plugin.cost
    assert plugin.source
    asked: set[str] = set()
    features = make(20)
    real: dict[str, Callable[[], Any]] = {
        key: getattr(features, key) for key in ("embeddings", "shot_embeddings", "clusters", "lengths")
    }
    for key, function in real.items():
        setattr(features, key, lambda key=key, function=function: (asked.add(key), function())[1])
    features.shots = None if "shots" not in plugin.needs else features.shots  # type: ignore[assignment]
    if not params:
        run(name, params, features, "5")
        assert asked - {"shot_embeddings"} <= plugin.needs


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("kshot", {}),
        ("mmr", {}),
        ("facility", {"mode": "shots"}),
        ("kcenter", {"start": "shots"}),
        ("kmq", {"quality": "shots"}),
    ],
)
def test_a_method_that_needs_shots_says_so(name: str, params: dict[str, Any]) -> None:
    features = make(20)
    features.shots = None  # type: ignore[assignment]
    with pytest.raises(BadInput, match="needs shots"):
        run(name, params, features, "5")


def test_a_selector_that_breaks_the_contract_is_found_out() -> None:
    features = make(20)

    class Wrong:
        def __init__(self, rows: list[int], scores: list[float]) -> None:
            self.found = Selection(np.array(rows), np.array(scores, dtype=np.float32), ["why"] * len(rows))

        def select(self, *_: Any) -> Selection:
            return self.found

    for rows, scores in (
        ([0, 0], [1, 1]),
        ([20], [1]),
        ([0], [1, 2]),
        ([0], [float("nan")]),
        ([], []),
        ([0, 1, 2], [1] * 3),
    ):
        with pytest.raises(ValueError, match="Wrong"):
            choose(Wrong(rows, scores), features, None, Budget.parse("2"))
