"""Router cascade: who answers first, and when another takes over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.observing import experts_of, learned, observed, opened, request, requests_of
from xpert import plugins
from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.routers._cuts import cut_by_count, cut_by_gain
from xpert.protocols import Escalation, Observations, RoutableExpert, RouterState
from xpert.records import Row


@pytest.fixture
def experts(rows: list[Row]) -> list[RoutableExpert]:
    return experts_of(rows)


@pytest.fixture
def seen(rows: list[Row], experts: list[RoutableExpert]) -> Observations:
    return observed(experts, requests_of(rows[:100]))


def ready(experts: Any, **params: Any) -> Any:
    return opened("cascade", experts, None, **params)


class TestWithoutTraining:
    def test_the_base_first_and_then_the_nearest(self, experts: Any, rows: list[Row]) -> None:
        (route,) = ready(experts, threshold="0.6").route(requests_of(rows[1:2]))
        assert route.experts == ()
        assert route.escalation == Escalation((("x/casing", 1.0),), 0.6)
        assert route.reason.startswith("weak base answers; where its confidence is under 0.600, x/casing takes over: ")
        assert "nearest skill" in route.reason
        assert len(route.candidates) == 3

    def test_where_nobody_is_stronger_the_weak_answers_alone(self, experts: Any) -> None:
        (route,) = ready(experts, threshold="0.6").route([request("¿Dónde está la biblioteca?")])
        assert (route.experts, route.escalation) == ((), None)
        assert route.reason.startswith("weak base answers alone: nearest skill")

    def test_named_weak_and_strong(self, experts: Any) -> None:
        (route,) = ready(experts, threshold="0.4", weak="x/casing", strong="x/reversal").route([request("a")])
        assert route.experts == (("x/casing", 1.0),)
        assert route.escalation == Escalation((("x/reversal", 1.0),), 0.4)
        assert "x/reversal takes over: strong is always x/reversal" in route.reason
        (route,) = ready(experts, threshold="0.4", weak="x/casing", strong="base").route([request("a")])
        assert route.escalation == Escalation((), 0.4)
        assert "the base takes over" in route.reason

    def test_a_weak_expert_is_not_taken_over_by_itself(self, experts: Any, rows: list[Row]) -> None:
        router = ready(experts, threshold="0.4", weak="x/casing")
        own, other = router.route(requests_of(rows[1:3]))
        assert (own.experts, own.escalation) == ((("x/casing", 1.0),), None)
        assert other.escalation == Escalation((("x/reversal", 1.0),), 0.4)

    def test_the_router_takes_its_parameters(self, experts: Any, rows: list[Row]) -> None:
        (route,) = ready(experts, threshold="0.4", router="fixed", router_params="weights=x/casing:3").route(
            requests_of(rows[:1])
        )
        assert route.escalation == Escalation((("x/casing", 1.0),), 0.4)
        (route,) = ready(experts, threshold="1", router_params="top=3,threshold=-1").route(requests_of(rows[:1]))
        assert route.escalation is not None
        assert len(route.escalation.experts) == 3

    def test_before_the_score_decides(self, experts: Any, rows: list[Row]) -> None:
        asked = [*requests_of(rows[:3]), request("Write something in capitals, will you?")]
        plain = ready(experts, mode="before", threshold="0").route(asked)
        cut = sorted(route.candidates[0].score for route in plain)[1]
        for route, one in zip(ready(experts, mode="before", threshold=str(cut)).route(asked), plain, strict=True):
            assert route.escalation is None
            if one.candidates[0].score >= cut:
                assert route.experts == one.experts
                assert f"reaches {cut:.3f}" in route.reason
            else:
                assert route.experts == ()
                assert f"is under {cut:.3f}: weak base answers" in route.reason

    def test_before_with_a_named_strong_takes_its_score(self, experts: Any, rows: list[Row]) -> None:
        router = ready(experts, mode="before", threshold="0.3", strong="x/casing")
        arithmetic, casing = router.route(requests_of(rows[:2]))
        assert casing.experts == (("x/casing", 1.0),)
        assert arithmetic.experts == ()
        assert "of x/casing is under 0.300" in arithmetic.reason

    def test_whether_it_needs_training(self) -> None:
        kind = plugins.load("router", "cascade")
        for params, needless in (
            ({"threshold": "0.5"}, True),
            ({"threshold": "0.5", "strong": "x"}, True),
            ({"threshold": "0.5", "router": "random"}, True),
            ({"threshold": "0.5", "router": "mf"}, False),
            ({"threshold": "0.5", "strong": "x", "mode": "before", "router": "mf"}, False),
            ({"share": "0.5"}, False),
            ({}, False),
        ):
            assert kind.untrained(kind.Options.from_mapping(params)) is needless, params

    def test_a_mixture_opens_it_without_a_state(self, mixture_file: Callable[..., Path]) -> None:
        from xpert.experts.mixture_file import load_mixture
        from xpert.experts.routing import MixtureRouter, explain

        router = MixtureRouter(load_mixture(str(mixture_file("cascade", threshold=0.5))))
        (route,) = router.route([request("Write the word in capitals.\n\nbaca (case 7 dodo)")])
        told = json.loads(json.dumps(explain("1", route)))
        assert told["escalation"] == {"experts": [{"expert": "casing", "weight": 1.0}], "below": 0.5}
        with pytest.raises(BadInput, match="router cascade has to be trained for this mixture first"):
            MixtureRouter(load_mixture(str(mixture_file("cascade", name="untrained"))))


class TestLearned:
    def test_by_gain_the_strong_takes_over_where_it_is_better(self, experts: Any, seen: Observations) -> None:
        """The base is sure (0.9) where it is best, and unsure (0.3) where an expert is."""
        router, state = learned("cascade", experts, seen)
        assert 0.301 < router.threshold < 0.9
        figures = state.facts["figures"]
        assert figures["strong_share"] == pytest.approx(0.6)
        assert figures["weak_score"] == pytest.approx(0.5)
        assert figures["score"] == pytest.approx(0.8)
        assert all(route.escalation.below == router.threshold for route in router.route(seen.requests[:3]))

    def test_by_share(self, experts: Any, seen: Observations) -> None:
        for share in (0.0, 0.1, 0.25, 0.6):
            router, state = learned("cascade", experts, seen, share=str(share))
            assert seen.confidences is not None
            routes = router.route(seen.requests)
            sure = seen.confidences[:, -1]
            taken = [r.escalation is not None and c < r.escalation.below for r, c in zip(routes, sure, strict=True)]
            assert np.mean(taken) == pytest.approx(share, abs=0.005)
            assert state.facts["figures"]["strong_share"] == pytest.approx(share, abs=0.005)

    def test_a_price_makes_the_strong_rarer(self, experts: Any, seen: Observations) -> None:
        assert learned("cascade", experts, seen, price="0.4")[1].facts["figures"]["strong_share"] == pytest.approx(0.6)
        assert learned("cascade", experts, seen, price="0.6")[1].facts["figures"]["strong_share"] == 0

    @pytest.mark.parametrize(("router", "params"), [("centroid", ""), ("mf", "rate=0.01,epochs=150"), ("tryage", "")])
    @pytest.mark.parametrize("share", [0.2, 0.5])
    def test_before_by_share(self, router: str, params: str, share: float, experts: Any, seen: Observations) -> None:
        """Of prompts that the router would give to the base anyway none can go to an expert."""
        made, _ = learned("cascade", experts, seen, mode="before", router=router, router_params=params, share=share)
        routes = made.route(seen.requests)
        assert np.mean([bool(route.experts) for route in routes]) == pytest.approx(share, abs=0.05)

    @pytest.mark.parametrize(("router", "params"), [("mf", "rate=0.01,epochs=150"), ("tryage", "")])
    def test_before_by_gain(self, router: str, params: str, experts: Any, seen: Observations) -> None:
        made, state = learned("cascade", experts, seen, mode="before", router=router, router_params=params)
        assert 0.7 < state.facts["figures"]["score"] <= 0.8
        routes = made.route(seen.requests)
        wanted = [() if one.skill in ("colour", "city") else ((f"x/{one.skill}", 1.0),) for one in seen.requests]
        assert sum(route.experts == best for route, best in zip(routes, wanted, strict=True)) > 90

    def test_what_is_gained_is_measured_on_prompts_that_the_router_does_not_know(
        self, experts: Any, seen: Observations
    ) -> None:
        """Scores that are noise are learned by heart; on the others nothing is gained, and none is sent on."""
        r = np.random.default_rng(0)
        scores = np.column_stack([r.integers(0, 2, (100, 3)), np.full(100, 0.6)]).astype(float)
        noise = replace(seen, scores=scores)
        params = {"router": "category", "router_params": "classifier=knn,neighbours=1,margin=0,categories=clusters"}
        _, state = learned("cascade", experts, noise, price="0.1", **params)
        assert state.facts["figures"]["strong_share"] < 0.2

    def test_equal_prompts_fall_into_one_fold(self, experts: Any, seen: Observations) -> None:
        from xpert.experts.routers._learning import canonical, left_out_routes

        twice = Observations(
            (*seen.requests, *(replace(one, id=f"{one.id}-again") for one in seen.requests)),
            seen.subjects,
            *(np.vstack([table, table]) for table in (seen.scores, seen.losses)),
        )
        known: list[set[str]] = []

        class Notes:
            def learn(self, experts: Any, part: Observations) -> None:
                known.append({one.prompt for one in part.requests})

            def route(self, requests: Any) -> list[Any]:
                assert not known[-1] & {one.prompt for one in requests}
                return [one.id for one in requests]

        observations = canonical("x", experts, twice)
        routes: list[Any] = left_out_routes(Notes, experts, observations)
        assert routes == [one.id for one in observations.requests]
        assert len(known) == 3

    def test_a_learned_router_s_state_travels_inside(self, experts: Any, seen: Observations) -> None:
        params = {"router": "mf", "router_params": "epochs=3,dim=4", "threshold": "0.5"}
        router, state = learned("cascade", experts, seen, **params)
        assert "router.factors.weights" in state.tensors
        assert opened("cascade", experts, state, **params).route(seen.requests) == router.route(seen.requests)
        with pytest.raises(BadInput, match="router cascade has to be trained"):
            opened("cascade", experts, None, **params)

    def test_a_given_threshold_overrides_the_learned(self, experts: Any, seen: Observations) -> None:
        _, state = learned("cascade", experts, seen)
        (route,) = opened("cascade", experts, state, threshold="0.123").route(seen.requests[:1])
        assert route.escalation is not None
        assert route.escalation.below == 0.123

    def test_observations_without_confidences(self, experts: Any, seen: Observations) -> None:
        bare = replace(seen, confidences=None)
        with pytest.raises(BadInput, match=r"have no confidences.*give a threshold"):
            learned("cascade", experts, bare)
        assert learned("cascade", experts, bare, threshold="0.5")
        assert learned("cascade", experts, bare, mode="before")
        with pytest.raises(BadInput, match="on no observed prompt could another take over from 'base'"):
            learned("cascade", experts, replace(seen, confidences=np.full_like(seen.scores, np.nan)))

    def test_answers_without_tokens_are_left_out(self, experts: Any, seen: Observations) -> None:
        assert seen.confidences is not None
        some = seen.confidences.copy()
        some[:10] = np.nan
        router, _ = learned("cascade", experts, replace(seen, confidences=some))
        assert 0.301 < router.threshold < 0.9

    def test_a_router_that_names_only_the_base(self, experts: Any, seen: Observations) -> None:
        with pytest.raises(BadInput, match="on no observed prompt could another take over"):
            learned("cascade", experts, seen, router="fixed", router_params="expert=base")

    def test_a_state_without_a_threshold(self, experts: Any, seen: Observations) -> None:
        _, state = learned("cascade", experts, seen)
        for value in (None, "0.5", True):
            with pytest.raises(Corrupt, match="has no threshold"):
                opened("cascade", experts, RouterState({}, {**state.facts, "threshold": value}))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"threshold": "0.5", "share": "0.5"}, BadInput, "threshold and share exclude each other"),
        ({"price": "0.1", "share": "0.5"}, BadInput, "price is for a threshold that is learned by gain"),
        ({"threshold": "1.5"}, BadInput, "a confidence lies between 0 and 1"),
        ({"share": "1.5"}, BadInput, "share is 1.5; the most is 1"),
        ({"strong": "x", "router": "mf"}, BadInput, "the strong is named, so that no router is asked"),
        ({"strong": "x", "router_params": "top=2"}, BadInput, "so that no router is asked"),
        ({"strong": "base"}, BadInput, "weak and strong are both 'base'"),
        ({"strong": "base", "weak": "x", "mode": "before"}, BadInput, "cannot be the strong in mode before"),
        ({"router": "cascade"}, BadInput, "a cascade cannot be its own router"),
        ({"router": "centroids"}, NotFound, "Did you mean 'centroid'"),
        ({"router_params": "top"}, BadInput, "'top' is not KEY=VALUE"),
        ({"router_params": "tpo=2"}, NotFound, "router centroid: unknown parameter 'tpo'"),
        ({"router_params": "top=two"}, BadInput, "top must be a whole number"),
        ({"mode": "during"}, NotFound, "unknown mode 'during'"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[BadInput], message: str) -> None:
    with pytest.raises(error, match=message):
        plugins.load("router", "cascade").Options.from_mapping(params)


@pytest.mark.parametrize("params", [{"weak": "x/casin"}, {"strong": "x/casin"}])
def test_an_expert_that_is_not_there(params: dict[str, str], experts: Any, seen: Observations) -> None:
    with pytest.raises(NotFound, match=r"unknown expert 'x/casin'\. Did you mean 'x/casing'"):
        ready(experts, threshold="0.5", **params)
    with pytest.raises(NotFound, match="unknown expert 'x/casin'"):
        learned("cascade", experts, seen, **params)


values = st.lists(st.integers(-5, 5).map(lambda tenths: tenths / 10), min_size=1, max_size=12).map(np.array)


@given(values, st.floats(0, 12))
def test_a_cut_by_count_is_the_nearest_there_is(of: Any, count: float) -> None:
    under = int((of < cut_by_count(of, count)).sum())
    possible = [int((of < cut).sum()) for cut in [*of, np.inf]]
    assert abs(under - count) == pytest.approx(min(abs(one - count) for one in possible))


@given(st.data(), values)
def test_a_cut_by_gain_is_the_best_there_is(data: st.DataObject, of: Any) -> None:
    gains = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=len(of), max_size=len(of))), dtype=float)
    cut = cut_by_gain(of, gains)
    best = max(float(gains[of < one].sum()) for one in [*of, np.inf])
    assert gains[of < cut].sum() == pytest.approx(best)
    lower = [one for one in of if one < cut and gains[of < one].sum() == best]
    assert not any((of < one).sum() < (of < cut).sum() for one in lower)


def test_cuts_between_numbers_that_are_neighbours() -> None:
    close = np.array([0.5, np.nextafter(0.5, 1)])
    assert [(close < cut_by_count(close, count)).tolist() for count in (0, 1, 2)] == [
        [False, False],
        [True, False],
        [True, True],
    ]
