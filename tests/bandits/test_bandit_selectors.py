"""quad and clusterucb: budgets, laziness, what is kept of full scoring, odd pools, the log and user mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.clustering import Clusters
from xpert.data import pool_from_rows
from xpert.errors import BadInput, NotFound
from xpert.features import FeatureOptions, Features
from xpert.protocols import Selection
from xpert.records import Budget, Message, Row, Shots
from xpert.selection import choose
from xpert.selectors import _bandits
from xpert.selectors._bandits import NAMES

BANDITS = ("quad", "clusterucb")
every_bandit = pytest.mark.parametrize("name", BANDITS)


class Planted:
    """A scorer whose scores are given; it counts what it is asked."""

    needs = frozenset[str]()

    def __init__(self, rewards: Any) -> None:
        self.rewards = np.asarray(rewards, np.float32)
        self.asked: list[int] = []
        self.calls = 0

    def score(self, rows: Any) -> Any:
        self.calls += 1
        self.asked += rows.tolist()
        return self.rewards[rows]

    def explain(self, row: int) -> str:
        return f"worth {self.rewards[row]:.2f}"

    def log(self) -> list[dict[str, Any]]:
        return [{"step": "planted", "calls": self.calls}]


class Given:
    """Features that are given: clusters, lengths and a pool of as many rows."""

    lengths_unit = "tokens"

    def __init__(self, labels: Any, centroids: Any = None, lengths: Any = None) -> None:
        self.labels = np.asarray(labels, np.int32)
        many = int(self.labels.max()) + 1 if centroids is None else len(centroids)
        self.centroids = np.eye(many, dtype=np.float32) if centroids is None else centroids
        self._lengths = np.ones(len(labels), np.int64) if lengths is None else np.asarray(lengths, np.int64)
        self.pool = pool_from_rows([Row(f"r{i}", (Message("user", f"p{i}"),), "a") for i in range(len(labels))])

    def clusters(self) -> Clusters:
        return Clusters(self.labels, self.centroids, [[] for _ in self.centroids])

    def lengths(self) -> Any:
        return self._lengths


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Selection, Planted]]:
    def run(
        name: str,
        features: Any,
        rewards: Any,
        budget: str,
        *,
        seed: int = 0,
        excluded: Sequence[int] = (),
        **params: Any,
    ) -> tuple[Selection, Planted]:
        planted = Planted(rewards)
        monkeypatch.setattr(_bandits, "prepared_scorer", lambda *_: planted)
        plugin = plugins.load("selector", name)
        selector = plugin(plugin.Options.from_mapping({"reward": "length", **params}))
        found = choose(selector, features, None, Budget.parse(budget), seed=seed, excluded=excluded)
        return found, planted

    return run


def graded(seed: int, *, rows: int = 4000, many: int = 45, noise: float = 0.5) -> tuple[Given, Any]:
    """Clusters of unlike sizes whose mean rewards differ more than the rewards inside them."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(many), rng.choice(many, rows - many, p=rng.dirichlet(np.full(many, 2.0)))])
    centroids = rng.normal(size=(many, 16))
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    return Given(labels, centroids), rng.normal(size=many)[labels] + noise * rng.normal(size=rows)


@every_bandit
def test_a_fifth_of_the_evaluations_keeps_95_percent(name: str, run: Callable[..., Any]) -> None:
    kept, control = [], []
    for seed in range(5):
        features, rewards = graded(seed)
        best = np.sort(rewards)[::-1][:200].sum()
        found, planted = run(name, features, rewards, "5%", seed=seed)
        assert len(planted.asked) == 800 == found.log[-1]["scored"]
        kept.append(rewards[found.rows].sum() / best)
        control.append(rewards[run(name, features, rewards, "5%", seed=seed, policy="uniform")[0].rows].sum() / best)
    assert np.mean(kept) >= 0.95
    assert np.mean(control) < 0.8  # the pool does not give it away


@every_bandit
@pytest.mark.parametrize("policy", NAMES)
def test_rows_are_scored_once_and_no_others(name: str, policy: str, run: Callable[..., Any]) -> None:
    features, rewards = graded(1, rows=300, many=12)
    found, planted = run(name, features, rewards, "30", evaluate="25%", policy=policy)
    assert len(planted.asked) == len(set(planted.asked)) == 75
    assert np.flatnonzero(np.isfinite(found.pool_scores)).tolist() == sorted(planted.asked)
    assert found.scores.dtype == np.float32
    last = found.log[-1]
    assert last["step"] == "evaluations"
    assert (last["scored"], last["share"]) == (75, 0.25)
    pulls = [entry for entry in found.log if entry["step"] == "pull"]
    assert sum(entry["rows"] for entry in pulls) == 75
    assert len(pulls) == last["pulls"]
    assert {"round", "arm", "pulls", "mean reward", "index", "rows"} <= set(pulls[-1])
    assert found.log[0] == {"step": "planted", "calls": planted.calls}
    json.dumps(list(found.log), allow_nan=False)


@every_bandit
def test_a_model_is_asked_in_blocks(name: str, run: Callable[..., Any]) -> None:
    features, rewards = graded(1, rows=400, many=10)
    _, planted = run(name, features, rewards, "30", evaluate="200", batch=20)
    assert planted.calls <= 16


def test_the_best_of_all_scored_rows(run: Callable[..., Any]) -> None:
    features, rewards = graded(2, rows=500, many=10)
    found, planted = run("clusterucb", features, rewards, "40", evaluate="100")
    asked = np.array(planted.asked)
    assert found.rows.tolist() == asked[np.lexsort((asked, -planted.rewards[asked]))][:40].tolist()
    assert found.reasons[0].startswith("worth ")


def test_the_cold_start_reaches_every_cluster(run: Callable[..., Any]) -> None:
    sizes = [1, 2, 40, 100, 0, 57]
    features = Given(np.repeat(np.arange(6), sizes), np.eye(6, dtype=np.float32))
    for evaluate, expected in (("50%", [1, 1, 4, 10, 0, 6]), ("18", None), ("5", [1, 1, 1, 1, 0, 1]), ("3", None)):
        found, _ = run("clusterucb", features, np.arange(200.0), "2", evaluate=evaluate, cold_start=0.1)
        cold = [0] * 6
        for entry in found.log:
            if entry["step"] == "pull" and entry["round"] == 1:
                cold[entry["arm"]] += entry["rows"]
        if expected is not None:
            assert cold == expected
        elif evaluate == "18":
            assert sum(cold) == 18
            assert min(cold[arm] for arm in (0, 1, 2, 3, 5)) >= 1
        else:
            assert sorted(cold) == [0, 0, 0, 1, 1, 1]


@every_bandit
def test_more_rows_than_were_scored(name: str, run: Callable[..., Any]) -> None:
    labels = np.repeat([0, 1, 2], 30)
    rewards = np.array([0.0, 10.0, 5.0])[labels] + np.arange(90) / 1000
    found, planted = (
        run(name, Given(labels), rewards, "60", evaluate="30", batch=3, tau="mean")
        if name == "quad"
        else (run(name, Given(labels), rewards, "60", evaluate="30", batch=3))
    )
    asked = set(planted.asked)
    states = [row in asked for row in found.rows.tolist()]
    assert len(set(found.rows.tolist())) == 60
    assert found.log[-1]["chosen unscored"] == states.count(False) > 0
    unscored = [row for row in found.rows.tolist() if row not in asked]
    order = labels[unscored].tolist()
    assert order == sorted(order, key=[1, 2, 0].index), "unscored rows follow their clusters' worth"
    assert any("not scored; cluster 1 is worth 10" in reason for reason in found.reasons)
    if name == "clusterucb":
        assert states == sorted(states, reverse=True)
    else:  # what is known to be poor goes after what is likely good
        poor = [i for i, row in enumerate(found.rows) if row in asked and rewards[row] < 4]
        good = [i for i, row in enumerate(found.rows) if row not in asked and labels[row] == 1]
        assert good
        assert all(place > max(good) for place in poor)


@every_bandit
@pytest.mark.parametrize(
    "sizes",
    [[1], [1, 1], [1, 0, 1], [0, 30, 0], [1] * 7, [100, 1, 1, 0]],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
@pytest.mark.parametrize("kind", ["apart", "equal", "not scorable", "some not scorable"])
def test_odd_pools(name: str, sizes: list[int], kind: str, run: Callable[..., Any]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = len(labels)
    rewards = np.arange(rows, dtype=float) if kind == "apart" else np.full(rows, 0.1)
    if "not" in kind:
        rewards[:: 1 if kind == "not scorable" else 2] = np.nan
    for evaluate in ("1", "50%", "100%"):
        for budget in {1, (rows + 1) // 2, rows}:
            features = Given(labels, np.eye(len(sizes), dtype=np.float32))
            found, planted = run(name, features, rewards, str(budget), evaluate=evaluate)
            assert len(set(found.rows.tolist())) == budget
            assert np.isfinite(found.scores).all()
            assert len(planted.asked) == len(set(planted.asked)) == Budget.parse(evaluate).limit(rows)


@every_bandit
def test_rows_that_cannot_be_scored_are_taken_last(name: str, run: Callable[..., Any]) -> None:
    labels = np.repeat([0, 1], 20)
    rewards = np.where(np.arange(40) % 5 == 0, np.nan, 1.0)
    found, _ = run(name, Given(labels), rewards, "40", evaluate="100%")
    assert sorted(found.rows[-8:].tolist()) == list(range(0, 40, 5))
    assert all(reason.startswith("not scored: worth") for reason in found.reasons[-8:])
    assert found.log[-1]["not scorable"] == 8


@every_bandit
def test_budgets_in_tokens_and_excluded_rows(name: str, run: Callable[..., Any]) -> None:
    features, rewards = graded(3, rows=300, many=9)
    features._lengths = np.random.default_rng(0).integers(1, 50, 300)
    found, planted = run(name, features, rewards, "1000tok", evaluate="30", excluded=range(0, 300, 3))
    assert 950 < features.lengths()[found.rows].sum() <= 1000
    assert not set(found.rows.tolist()) & set(range(0, 300, 3))
    assert len(planted.asked) == 30
    assert np.isnan(found.pool_scores[::3]).all()


def test_quad_stops_when_claims_fill_the_budget(run: Callable[..., Any]) -> None:
    features, rewards = graded(4)
    few, planted = run("quad", features, rewards, "200", claim=100)
    assert len(few.rows) == 200
    assert len(planted.asked) < 300
    _, all_of_it = run("quad", features, rewards, "200")
    assert len(all_of_it.asked) == 800


def test_neighbours_share_what_is_learned(run: Callable[..., Any]) -> None:
    """Twenty arms close together are good: with a radius they are found with fewer pulls of the others."""
    rng = np.random.default_rng(0)
    direction = np.repeat(np.eye(10, 12), 20, axis=0) + 0.03 * rng.normal(size=(200, 12))
    centroids = (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    labels = np.tile(np.arange(200), 40)
    rewards = np.where(labels // 20 == 7, 1.0, 0.0) + 0.5 * rng.normal(size=8000)
    features = Given(labels, centroids)
    share = {
        radius: np.mean(
            labels[run("quad", features, rewards, "100", evaluate="400", batch=2, radius=radius)[1].asked] // 20 == 7
        )
        for radius in (0.0, 0.2)
    }
    assert share[0.2] > share[0.0] + 0.1


@every_bandit
def test_the_seed_decides(name: str, run: Callable[..., Any]) -> None:
    features, rewards = graded(5, rows=400, many=10)
    one, two, other = (run(name, features, rewards, "50", seed=seed)[0] for seed in (1, 1, 2))
    assert one.rows.tolist() == two.rows.tolist()
    assert list(one.log) == list(two.log)
    assert list(one.log) != list(other.log)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("quad", {"reward": "lenght"}, "Did you mean 'length'"),
        ("quad", {"reward": "similarity", "reward_params": "reduce=mix"}, "reduce"),
        ("clusterucb", {"policy": "ucb"}, "ucb1"),
        ("quad", {"evaluate": "200ktok"}, "rows are scored, not tokens"),
        ("quad", {"evaluate": "some"}, "not understood"),
        ("clusterucb", {"batch": 0}, "the least is 1"),
        ("quad", {"tau": "high"}, "write mean"),
        ("quad", {"tau": "101%"}, "a quantile such as"),
        ("quad", {"radius": -0.1}, "the least is 0"),
        ("clusterucb", {"radius": 0.2}, "radius"),
        ("clusterucb", {"epsilon": 1.5}, "the most is 1"),
    ],
)
def test_mistakes_are_named(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInput, NotFound)) as caught:
        plugins.load("selector", name).Options.from_mapping(params)
    assert message in f"{caught.value} {caught.value.hint}"


@every_bandit
def test_more_evaluations_than_rows_are_refused(name: str, run: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match="pool holds 3"):
        run(name, Given([0, 1, 1]), np.zeros(3), "1", evaluate="4")


@every_bandit
def test_what_the_reward_needs_is_asked_for(name: str, rows: list[Row]) -> None:
    plugin = plugins.load("selector", name)
    features = Features(pool_from_rows(rows), FeatureOptions(clusters="4"), cache=None)
    with pytest.raises(BadInput, match="'similarity' needs shots"):
        choose(plugin(plugin.Options(reward="similarity")), features, None, Budget.parse("5"))
    with pytest.raises(BadInput, match="--base MODEL"):
        choose(plugin(plugin.Options()), features, Shots(tuple(rows[:3])), Budget.parse("5"))


@every_bandit
def test_only_pulled_rows_reach_the_model(name: str, rows: list[Row], tiny_base: Path) -> None:
    from xpert.answer_losses import AnswerLosses

    options = FeatureOptions(base=str(tiny_base), clusters="4", max_length=128)
    features = Features(pool_from_rows(rows[:60]), options, cache=None, device="cpu")
    plugin = plugins.load("selector", name)
    found = choose(plugin(plugin.Options(reward="perplexity", evaluate="20")), features, None, Budget.parse("5"))
    assert features.computed(AnswerLosses(str(tiny_base), 128)) == 20
    assert "perplexity" in found.reasons[0]
