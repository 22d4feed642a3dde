"""Router category: classes of prompts, and the experts that a budget of parameters can keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.serving.observing import experts_of, learned, observed, opened, request, requests_of
from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.routers._category_budget import kept_experts
from xpert.experts.routers._classifying import Knn, Logistic
from xpert.protocols import Observations, RoutableExpert, RouteRequest
from xpert.records import Message, Row


@pytest.fixture
def experts(rows: list[Row]) -> list[RoutableExpert]:
    return experts_of(rows)


@pytest.fixture
def seen(rows: list[Row], experts: list[RoutableExpert]) -> Observations:
    return observed(experts, requests_of(rows[:150]), noise=0.1)


def fresh(columns: Callable[..., Any], count: int = 100) -> list[RouteRequest]:
    made = columns(count, seed=77)
    return [RouteRequest(c["id"], (Message("user", f"{c['instruction']}\n\n{c['input']}"),), c["skill"]) for c in made]


def best_of(skill: str | None) -> tuple[tuple[str, float], ...]:
    return () if skill in ("colour", "city") else ((f"x/{skill}", 1.0),)


@pytest.mark.parametrize("params", [{}, {"classifier": "knn"}, {"categories": "clusters", "clusters": "10"}])
def test_every_category_gets_its_best(
    params: dict[str, str], experts: Any, seen: Observations, columns: Callable[..., Any]
) -> None:
    router, _ = learned("category", experts, seen, **params)
    asked = fresh(columns)
    routes = router.route([replace(one, skill=None) for one in asked])
    right = sum(route.experts == best_of(one.skill) for route, one in zip(routes, asked, strict=True))
    assert right >= 95


def test_a_route_says_category_probability_and_margin(experts: Any, seen: Observations) -> None:
    router, _ = learned("category", experts, seen)
    (route,) = router.route([seen.requests[1]])
    assert route.reason.startswith("category 'casing', probability 0.9")
    assert "margin 0." in route.reason
    assert "x/casing has the best mean score" in route.reason
    assert route.candidates[0].expert == "x/casing"
    assert len(route.candidates) == 3
    (route,) = router.route([seen.requests[3]])
    assert "no expert is better than the base, 0.50; the base answers" in route.reason


@pytest.mark.parametrize(("classifier", "far"), [("logistic", "¿Dónde está?"), ("knn", "¿Dónde está?"), ("knn", "")])
def test_an_unsure_prompt_goes_to_the_best_over_all_or_to_the_base(
    classifier: str, far: str, experts: Any, seen: Observations
) -> None:
    better = replace(seen, scores=np.where(np.array(seen.subjects) == "x/reversal", 0.8, seen.scores))
    router, _ = learned("category", experts, better, classifier=classifier)
    (route,) = router.route([request(far)])
    assert route.experts == (("x/reversal", 1.0),)
    assert "unsure; over all categories x/reversal has the best mean score, 0.80" in route.reason
    router, _ = learned("category", experts, better, classifier=classifier, unsure="base")
    (route,) = router.route([request(far)])
    assert route.experts == ()
    assert "under 0.10: unsure; the base answers" in route.reason
    router, _ = learned("category", experts, better, classifier=classifier, margin="0")
    assert "unsure" not in router.route([request(far)])[0].reason


def test_few_prompts_count_little(rows: list[Row], experts: Any) -> None:
    """One lucky answer is not enough to be the best of a category; four are, and without shrinkage one is."""
    casing = [row for row in rows if row.skill == "casing"]
    others = [row for row in rows if row.skill in ("colour", "city")]

    def choice(lucky: int, **params: str) -> tuple[tuple[str, float], ...]:
        asked = requests_of([*others[:40], *casing[:lucky]])
        scores = np.tile([0.0, 0.0, 0.0, 0.5], (len(asked), 1))
        scores[40:, 0] = 1.0
        table = Observations(tuple(asked), ("x/arithmetic", "x/casing", "x/reversal", "base"), scores, 1 - scores)
        router, _ = learned("category", experts, table, margin="0", **params)
        return router.route(requests_of(casing[:1]))[0].experts  # type: ignore[no-any-return]

    assert choice(1) == ()
    assert choice(1, shrinkage="0") == (("x/arithmetic", 1.0),)
    assert choice(6) == (("x/arithmetic", 1.0),)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (None, {"x/arithmetic", "x/casing", "x/reversal"}),
        ("6000", {"x/arithmetic", "x/casing", "x/reversal"}),
        ("1", {"x/arithmetic", "x/casing", "x/reversal"}),
        ("5999", {"x/casing", "x/reversal"}),
        ("4000", {"x/arithmetic", "x/reversal"}),
        ("0.5", {"x/arithmetic", "x/casing"}),
        ("2000", {"x/casing"}),
        ("1000", {"x/arithmetic"}),
        ("999", set()),
        ("0", set()),
    ],
)
def test_the_budget_keeps_what_is_worth_most(budget: str | None, kept: set[str], rows: list[Row], experts: Any) -> None:
    """Prompts of reversal come most often, of arithmetic least; the experts have 1000, 2000 and 3000 parameters."""
    by_skill = {skill: [row for row in rows if row.skill == skill] for skill in ("arithmetic", "casing", "reversal")}
    asked = [*by_skill["arithmetic"][:10], *by_skill["casing"][:14], *by_skill["reversal"][:16]]
    seen = observed(experts, requests_of(asked))
    router, state = learned("category", experts, seen, **({"budget": budget} if budget else {}))
    routes = router.route(requests_of(asked))
    assert {key for route in routes for key, _ in route.experts} == kept
    for route, row in zip(routes, asked, strict=True):
        if f"x/{row.skill}" in kept:
            assert route.experts == ((f"x/{row.skill}", 1.0),)
        elif not kept:
            assert "no expert within the budget is better than the base" in route.reason
    other = opened("category", experts, state, budget="1000")  # another budget needs no training
    assert {key for route in other.route(requests_of(asked)) for key, _ in route.experts} <= {"x/arithmetic"}


def test_a_chosen_expert_is_among_the_candidates(rows: list[Row]) -> None:
    """Of 80 experts the cheapest alone is within the budget, and 50 better ones are listed."""
    asked = requests_of(rows[:10])
    experts = [RoutableExpert(f"e{i:02}", (), costs={"parameters": 10.0 if i == 70 else 1000.0}) for i in range(80)]
    scores = np.tile(np.r_[np.linspace(1, 0.6, 80), 0.5], (10, 1))
    seen = Observations(tuple(asked), (*(e.key for e in experts), "base"), scores, 1 - scores)
    router, _ = learned("category", experts, seen, budget="50")
    for route in router.route(asked):
        assert route.experts == (("e70", 1.0),)
        assert len(route.candidates) == 51
        assert route.candidates[-1].expert == "e70"
        assert "within the budget; e00 has 1.00" in route.reason


def test_several_experts_of_a_category(experts: Any, seen: Observations) -> None:
    scores = np.tile([0.9, 0.8, 0.3, 0.5], (len(seen.requests), 1))
    router, _ = learned("category", experts, replace(seen, scores=scores), top="3")
    (route,) = router.route([seen.requests[0]])
    assert [key for key, _ in route.experts] == ["x/arithmetic", "x/casing"]
    assert sum(weight for _, weight in route.experts) == pytest.approx(1)


def test_categories_are_clusters_where_no_prompt_has_a_skill(experts: Any, seen: Observations) -> None:
    bare = replace(seen, requests=tuple(replace(one, skill=None) for one in seen.requests))
    _, state = learned("category", experts, bare)
    assert len(state.facts["labels"]) == round(math.sqrt(150 / 2))
    assert any("numbers" in label for label in state.facts["labels"])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"classifier": "tree"}, NotFound, "unknown classifier 'tree'"),
        ({"categories": "skill"}, NotFound, "Did you mean 'skills'"),
        ({"unsure": "nobody"}, NotFound, "unknown unsure 'nobody'"),
        ({"budget": "-1"}, BadInput, "budget is -1.0; the least is 0"),
        ({"budget": "much"}, BadInput, "budget must be a number"),
        ({"margin": "2"}, BadInput, "margin is 2.0; the most is 1"),
        ({"neighbours": "0"}, BadInput, "neighbours is 0; the least is 1"),
        ({"clusters": "many", "categories": "clusters"}, BadInput, "clusters is 'many'"),
        ({"clusters": "500", "categories": "clusters"}, BadInput, "clusters is 500, but"),
        ({"embedder": "lsaa"}, NotFound, "Did you mean 'lsa'"),
        ({"embedder": "lsa:x"}, BadInput, "the embedder lsa takes no argument"),
        ({"embedder": "lm"}, BadInput, "base"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[BadInput], message: str, experts: Any, seen: Any) -> None:
    with pytest.raises(error, match=message):
        learned("category", experts, seen, **params)


def test_prompts_of_which_only_some_have_a_skill_are_refused(experts: Any, seen: Observations) -> None:
    some = replace(seen, requests=(replace(seen.requests[0], skill=None), *seen.requests[1:]))
    with pytest.raises(BadInput, match=r"1 of 150 observed prompts have no skill, such as 'r00000'\. Label them all"):
        learned("category", experts, some)
    assert learned("category", experts, some, categories="clusters")


def test_a_budget_needs_the_parameters_of_all(experts: Any, seen: Observations) -> None:
    bare = [replace(experts[0], costs={}), *experts[1:]]
    with pytest.raises(BadInput, match="the parameters of expert 'x/arithmetic' are not known"):
        learned("category", bare, seen, budget="100")
    assert learned("category", bare, seen)


def brute_force(gain: Any, weight: Any, costs: Any, budget: int) -> float:
    best = 0.0
    for count in range(gain.shape[1] + 1):
        for kept in itertools.combinations(range(gain.shape[1]), count):
            if sum(costs[list(kept)]) <= budget:
                best = max(best, value(gain, weight, kept))
    return best


def value(gain: Any, weight: Any, kept: Any) -> float:
    return float(sum(w * max([0.0, *(row[m] for m in kept)]) for w, row in zip(weight, gain, strict=True)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_integer_program_equals_brute_force(data: st.DataObject) -> None:
    categories, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    level = st.integers(-4, 8).map(lambda tenths: tenths / 10)
    gain = data.draw(arrays.arrays(np.float64, (categories, experts), elements=level))
    weight = data.draw(arrays.arrays(np.float64, categories, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5])))
    largest = data.draw(st.sampled_from([3, 50, 10**8]))
    costs = data.draw(arrays.arrays(np.int64, experts, elements=st.integers(0, largest)))
    budget = data.draw(st.integers(0, int(costs.sum()) + 1))
    kept = kept_experts(gain, weight, costs, budget)
    assert sum(costs[kept]) <= budget
    assert value(gain, weight, kept) == pytest.approx(brute_force(gain, weight, costs, budget), abs=1e-9)
    assert all(value(gain, weight, [m for m in kept if m != one]) < value(gain, weight, kept) for one in kept)
    everything = kept_experts(gain, weight, costs, None)
    assert value(gain, weight, everything) == pytest.approx(value(gain, weight, range(experts)), abs=1e-9)


def test_the_budget_is_kept_to_the_last_parameter() -> None:
    """One parameter of a hundred million too many lies within the solver's tolerance, and not within the budget."""
    costs = np.array([100_000_000, 100_000_001, 60_000_000], dtype=np.int64)
    gain = np.array([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.1]])
    weight = np.ones(3) / 3
    assert kept_experts(gain, weight, costs, 200_000_001) == [0, 1]
    assert kept_experts(gain, weight, costs, 200_000_000) in ([0, 2], [1, 2])


def test_nearest_prompts_vote_with_their_cosines() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rng.integers(0, 3, 40)
    found = Knn.fit(rows, labels, 3, 5).probabilities(rows[:10] * np.float32(0.5))
    for place in range(10):
        cosines = [float(np.round(rows[place] @ row * 0.5, 5)) for row in rows]
        votes = [float((labels == category).mean()) for category in range(3)]
        for near in sorted(range(40), key=lambda j: (-cosines[j], j))[:5]:
            votes[labels[near]] += max(0.0, cosines[near])
        assert found[place] == pytest.approx(np.array(votes) / sum(votes), abs=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_logistic_regression_gives_the_library_s_probabilities(count: int) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    rows = rng.standard_normal((12, 4)).astype(np.float32)
    labels = np.r_[np.arange(count), np.full(12 - count, 0)]  # too few of a category to choose a penalty by
    found = Logistic.fit(rows, labels, count).probabilities(rows)
    wanted = LogisticRegression(C=10.0, max_iter=1000).fit(rows, labels).predict_proba(rows)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_options_are_told(experts: Any, seen: Observations) -> None:
    """What `xpert methods` says stands on the options, and the class binds what the seam asks for."""
    kind = plugins.load("router", "category")
    assert kind.learned is True
    _, state = learned("category", experts, seen)
    assert state.facts["options"] == {
        "embedder": "lsa",
        "classifier": "logistic",
        "categories": "auto",
        "clusters": "auto",
    }
