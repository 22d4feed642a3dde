"""Router tryage: predicted losses, their costs, and the front between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.serving.observing import experts_of, learned, observed, opened, request, requests_of
from xpert.errors import BadInput, NotFound
from xpert.experts.router_learning.cost_front import cost_front, turning_points
from xpert.experts.routers._flags import FLAGS, read_flags
from xpert.experts.routers._regression import PENALTIES, Mlp, Ridge, left_out_residuals
from xpert.protocols import Observations, RoutableExpert, RouteRequest
from xpert.records import Message, Row


@pytest.fixture
def experts(rows: list[Row]) -> list[RoutableExpert]:
    return experts_of(rows)


@pytest.fixture
def seen(rows: list[Row], experts: list[RoutableExpert]) -> Observations:
    return observed(experts, requests_of(rows[:150]), noise=0.1)


@pytest.mark.parametrize("predict", ["loss", "score"])
@pytest.mark.parametrize("head", ["ridge", "mlp"])
def test_the_least_predicted_loss_answers(
    predict: str, head: str, experts: Any, seen: Observations, columns: Callable[..., Any]
) -> None:
    router, state = learned("tryage", experts, seen, predict=predict, head=head)
    right = 0
    for c in columns(100, seed=77):
        (route,) = router.route([RouteRequest("1", (Message("user", f"{c['instruction']}\n\n{c['input']}"),))])
        wanted = () if c["skill"] in ("colour", "city") else ((f"x/{c['skill']}", 1.0),)
        right += route.experts == wanted
    assert right >= 95
    error = state.facts["training"]["left_out_error" if head == "ridge" else "held_out_error"]
    assert 0.1 < error < 0.4  # a tenth of the scores is turned around: 0.3 is the least there is


def test_what_is_predicted_is_what_is_followed(experts: Any, seen: Observations) -> None:
    """Where losses and scores disagree, each goes its own way."""
    losses = np.tile([1.0, 2.0, 3.0, 2.5], (150, 1))
    scores = np.tile([0.1, 0.2, 0.9, 0.5], (150, 1))
    at_odds = replace(seen, losses=losses, scores=scores)
    (by_loss,) = learned("tryage", experts, at_odds)[0].route([request("a")])
    (by_score,) = learned("tryage", experts, at_odds, predict="score")[0].route([request("a")])
    assert by_loss.experts == (("x/arithmetic", 1.0),)
    assert by_loss.reason == "predicted loss of x/arithmetic 1.000, base 2.500"
    assert [(c.expert, c.score) for c in by_loss.candidates] == [
        ("x/arithmetic", 1.5),
        ("x/casing", 0.5),
        ("x/reversal", -0.5),
    ]
    assert by_score.experts == (("x/reversal", 1.0),)
    assert by_score.reason == "predicted score of x/reversal 0.900, base 0.500"


@pytest.mark.parametrize(
    ("params", "expert"),
    [
        ({}, "x/reversal"),
        ({"size_weight": "0.3"}, "x/reversal"),
        ({"size_weight": "0.9"}, "x/arithmetic"),
        ({"size_weight": "3"}, None),
        ({"seconds_weight": "0.9"}, "x/arithmetic"),
        ({"seconds_weight": "30"}, "x/arithmetic"),  # the base is no faster than the fastest expert
        ({"margin": "1.1"}, None),
    ],
)
def test_costs_count_as_they_are_weighed(
    params: dict[str, str], expert: str | None, experts: Any, seen: Observations
) -> None:
    """Losses 1.5, 1.3, 1.0 and the base's 2.0; sizes and seconds are 1/3, 2/3 and 1 of the most."""
    flat = replace(seen, losses=np.tile([1.5, 1.3, 1.0, 2.0], (150, 1)))
    (route,) = learned("tryage", experts, flat, **params)[0].route([request("anything")])
    assert route.experts == (((expert, 1.0),) if expert else ())
    for cost in ("size", "seconds"):
        if f"{cost}_weight" in params:
            assert f"+ {cost} 0.33 * {params[f'{cost}_weight']}" in route.reason or expert == "x/reversal"
    if not expert:
        assert "the base answers" in route.reason


def test_several_experts_that_beat_the_base(experts: Any, seen: Observations) -> None:
    flat = replace(seen, losses=np.tile([1.5, 1.3, 2.5, 2.0], (150, 1)))
    (route,) = learned("tryage", experts, flat, top="3", temperature="1")[0].route([request("anything")])
    assert [key for key, _ in route.experts] == ["x/casing", "x/arithmetic"]
    assert [weight for _, weight in route.experts] == pytest.approx([0.5498, 0.4502], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expert", "said"),
    [
        ("anything", "x/reversal", "base 2.000"),
        ("anything [Flag: smallest model]", "x/arithmetic", "; flag 'smallest model'"),
        ("[ flag :  FASTEST   Model ] anything", "x/arithmetic", "; flag 'fastest model'"),
        (
            "[Flag: smallest model][Flag: best model] anything",
            "x/reversal",
            "; flag 'smallest model'; flag 'best model'",
        ),
        ("anything [Flag: cleverest model]", "x/reversal", "; unknown flag 'cleverest model'"),
    ],
)
def test_flags(text: str, expert: str, said: str, experts: Any, seen: Observations) -> None:
    flat = replace(seen, losses=np.tile([1.5, 1.3, 1.0, 2.0], (150, 1)))
    router, _ = learned("tryage", experts, flat, flags="true")
    (route,) = router.route([request(text)])
    assert route.experts == ((expert, 1.0),)
    assert route.reason.endswith(said)
    router, _ = learned("tryage", experts, flat)
    (off,) = router.route([request(text)])
    assert off.experts == (("x/reversal", 1.0),)
    assert "flag" not in off.reason


def test_a_flag_overrides_the_options_and_says_if_it_cannot_be_followed(experts: Any, seen: Observations) -> None:
    flat = replace(seen, losses=np.tile([1.5, 1.3, 1.0, 2.0], (150, 1)))
    router, _ = learned("tryage", experts, flat, flags="true", size_weight="3")
    assert router.route([request("a")])[0].experts == ()
    assert router.route([request("a [flag: best model]")])[0].experts == (("x/reversal", 1.0),)
    slow = [replace(expert, costs={"parameters": 1.0}) for expert in experts]
    router, _ = learned("tryage", slow, flat, flags="true")
    (route,) = router.route([request("a [flag: fast model]")])
    assert route.reason.endswith("; flag 'fast model', which changes nothing: the seconds of the experts are not known")


def test_a_flag_is_not_part_of_what_is_predicted_from(experts: Any, seen: Observations) -> None:
    router, _ = learned("tryage", experts, seen, flags="true")
    plain = seen.requests[0].prompt
    with_flag, without = router.route([request(f"{plain} [Flag: best model]"), request(plain)])
    assert with_flag.candidates == without.candidates
    assert read_flags("[flag: x] [other: y] z").prompt == "[flag: x] [other: y] z"
    assert all(read_flags(f"a [Flag: {flag}]").weights == weights for flag, weights in FLAGS.items())


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"predict": "losses"}, NotFound, "Did you mean 'loss'"),
        ({"head": "forest"}, NotFound, "unknown head 'forest'"),
        ({"size_weight": "-1"}, BadInput, "size-weight is -1.0; the least is 0"),
        ({"flags": "maybe"}, BadInput, "flags must be true or false"),
        ({"width": "0"}, BadInput, "width is 0"),
        ({"lambda": "1"}, NotFound, "unknown parameter 'lambda'"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[BadInput], message: str, experts: Any, seen: Any) -> None:
    with pytest.raises(error, match=message):
        learned("tryage", experts, seen, **params)


@pytest.mark.parametrize(("cost", "name"), [("size", "parameters"), ("seconds", "seconds")])
def test_a_weight_needs_the_costs_of_all(cost: str, name: str, experts: Any, seen: Observations) -> None:
    bare = [*experts[:2], replace(experts[2], costs={k: v for k, v in experts[2].costs.items() if k != name})]
    with pytest.raises(
        BadInput, match=f"the {name} of expert 'x/reversal' are not known, and {cost}-weight counts them"
    ):
        learned("tryage", bare, seen, **{f"{cost}_weight": "0.1"})
    router, _ = learned("tryage", bare, seen)
    with pytest.raises(BadInput, match=f"the {name} of the experts are not known"):
        router.front(seen, cost=cost)
    with pytest.raises(NotFound, match="unknown cost 'weight'"):
        router.front(seen, cost="weight")
    assert all(cost not in point for point in router.pareto())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_left_out_residuals_equal_fits_without_each_prompt(n: int, d: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((n, m))
    for penalty, residuals in zip((0.1, 3.0), left_out_residuals(x, y, (0.1, 3.0)), strict=True):
        for place in range(n):
            kept = np.delete(np.arange(n), place)
            # The intercept of the rest, fitted plainly: a column of ones that the penalty leaves alone.
            design = np.column_stack([x[kept], np.ones(n - 1)])
            pull = np.diag([penalty] * d + [0.0])
            fitted = np.linalg.solve(design.T @ design + pull, design.T @ y[kept])
            assert residuals[place] == pytest.approx(y[place] - np.r_[x[place], 1.0] @ fitted, abs=1e-8)


def test_ridge_equals_the_library_s() -> None:
    from sklearn.linear_model import Ridge as Library

    rng = np.random.default_rng(3)
    x = rng.standard_normal((50, 8)).astype(np.float32)
    y = x @ rng.standard_normal((8, 4)) + rng.standard_normal((50, 4))
    head, left_out = Ridge.fit(x, y)
    assert head.penalty in PENALTIES
    wanted = Library(alpha=head.penalty).fit(x.astype(np.float64), y)
    assert head.predict(x) == pytest.approx(wanted.predict(x), abs=1e-9)
    assert head.error == pytest.approx(float(np.sqrt(((left_out.predicted - y) ** 2).mean())))
    others = [float((r**2).mean()) for r in left_out_residuals(x.astype(np.float64), y, PENALTIES)]
    assert head.error**2 == pytest.approx(min(others))


def test_a_network_finds_what_no_plane_can() -> None:
    """Exclusive or, of one output in units of thousands: a ridge errs by its whole deviation."""
    rng = np.random.default_rng(0)
    x = rng.choice([-0.7, 0.7], (200, 2)).astype(np.float32)
    y = 1000.0 * (np.sign(x[:, :1]) * np.sign(x[:, 1:])) + 5000
    network, left_out = Mlp.fit(x, y, width=16, epochs=200, seed=0)
    assert Ridge.fit(x, y)[0].error > 950
    assert network.error < 100
    assert len(left_out.rows) == 40
    assert network.error == pytest.approx(float(np.sqrt(((left_out.predicted - y[left_out.rows]) ** 2).mean())))


def all_choices(predicted: Any, costs: Any) -> set[tuple[int, ...]]:
    """What a dense sweep of weights chooses."""
    found = set()
    for weight in np.r_[0.0, np.geomspace(1e-4, 1e4, 4000)]:
        objective = np.round(predicted + weight * costs, 12)
        choice = [min(range(len(costs)), key=lambda m: (row[m], costs[m], m)) for row in objective]
        found.add(tuple(choice))
    return found


losses_and_costs = st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays.arrays(np.float64, shape, elements=st.integers(0, 20).map(lambda tenths: tenths / 10)),
        arrays.arrays(np.float64, shape, elements=st.integers(0, 20).map(lambda tenths: tenths / 10)),
        arrays.arrays(np.float64, shape[1], elements=st.integers(0, 10).map(lambda tenths: tenths / 10)),
    )
)


@settings(max_examples=60, deadline=None)
@given(losses_and_costs, st.integers(2, 64))
def test_no_point_of_the_front_is_dominated(drawn: Any, points: int) -> None:
    predicted, observed_losses, costs = drawn
    front = cost_front(predicted, observed_losses, costs, points=points)
    assert front
    assert len(front) <= points
    for one, next_one in zip(front, front[1:], strict=False):
        assert one.cost > next_one.cost and one.loss < next_one.loss
    for point in front:
        assert sum(point.shares) == pytest.approx(1)
        assert point.cost == pytest.approx(float(np.dot(point.shares, costs)))
        objective = np.round(predicted + point.weight * costs, 12)
        choice = [min(range(len(costs)), key=lambda m, row=row: (row[m], costs[m], m)) for row in objective]
        assert point.loss == pytest.approx(
            float(np.mean([row[m] for row, m in zip(observed_losses, choice, strict=True)]))
        )


@settings(max_examples=20, deadline=None)
@given(losses_and_costs)
def test_the_front_misses_nothing_that_a_dense_sweep_finds(drawn: Any) -> None:
    predicted, observed_losses, costs = drawn
    front = cost_front(predicted, observed_losses, costs, points=10_000)
    n = np.arange(len(predicted))
    for choice in all_choices(predicted, costs):
        loss, cost = float(observed_losses[n, list(choice)].mean()), float(costs[list(choice)].mean())
        assert any(point.loss <= loss + 1e-9 and point.cost <= cost + 1e-9 for point in front)


def test_turning_points() -> None:
    """1 + 0 w, 0.5 + 1 w and 0 + 2 w cross at once at 0.5; 0.9 + 1 w never is the least."""
    costs = np.array([0.0, 1.0, 2.0])
    assert turning_points(np.array([[1.0, 0.5, 0.0]]), costs).tolist() == [0.5]
    assert turning_points(np.array([[1.0, 0.9, 0.0]]), costs).tolist() == [0.5]
    assert turning_points(np.array([[1.0, 0.2, 0.0]]), costs) == pytest.approx([0.2, 0.8])
    assert turning_points(np.array([[0.0, 0.2, 0.3]]), costs).tolist() == []
    with pytest.raises(ValueError, match="do not fit"):
        cost_front(np.zeros((2, 3)), np.zeros((2, 2)), costs)


@pytest.mark.parametrize("head", ["ridge", "mlp"])
@pytest.mark.parametrize("predict", ["loss", "score"])
def test_pareto_is_told_and_comes_back_with_the_state(
    predict: str, head: str, experts: Any, seen: Observations
) -> None:
    params = {"predict": predict, "head": head, "epochs": "30"}
    router, state = learned("tryage", experts, seen, **params)
    points = router.pareto()
    assert points == opened("tryage", experts, state, **params).pareto()
    by_size = [point for point in points if "size" in point]
    assert set(by_size[0]) == {"size_weight", predict, "size"}
    assert by_size[-1]["size"] == 0  # in the end the base answers everything
    assert len(by_size) > 1
    assert by_size[-1][predict] == pytest.approx({"loss": 1.5, "score": 0.5}[predict])
    quality = [point[predict] for point in by_size]
    assert quality == sorted(quality, reverse=predict == "score")
    assert [point for point in points if "seconds" in point]
    on_others = router.front(seen)
    assert on_others[-1].shares == (0, 0, 0, 1)
