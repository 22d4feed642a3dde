"""The contract of every router, and what each of them promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.observing import observed
from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.protocols import RoutableExpert, Route, RouteRequest
from xpert.records import Message, Row

SKILLS = ("arithmetic", "casing", "reversal", "colour", "city")


def experts_for(rows: list[Row], skills: tuple[str, ...] = SKILLS) -> list[RoutableExpert]:
    return [
        RoutableExpert(f"x/{skill}", tuple(row.prompt for row in rows if row.skill == skill), (skill,))
        for skill in skills
    ]


def requests_for(rows: list[Row]) -> list[RouteRequest]:
    return [RouteRequest(row.id, row.messages, row.skill) for row in rows]


def make(name: str, experts: list[RoutableExpert], *, seed: int = 0, **params: Any) -> Any:
    """One that learns does so from the experts' exemplars, each expert being right on its own."""
    kind = plugins.load("router", name)
    options = kind.Options.from_mapping(params)
    if not getattr(kind, "learned", False):
        router = kind(options, seed=seed)
    else:
        asked = [
            RouteRequest(f"{expert.key}-{place}", (Message("user", text),), expert.skills[0])
            for expert in experts
            for place, text in enumerate(expert.exemplars)
        ]
        state = kind(options, seed=seed).learn(experts, observed(experts, asked))
        router = kind(options, state=state, seed=seed)
    router.prepare(experts)
    return router


def held_out(columns: Callable[..., Any], count: int = 60) -> list[Row]:
    made = columns(count, seed=99)
    texts = [f"{c['instruction']}\n\n{c['input']}" for c in made]
    return [
        Row(f"h{i}", (Message("user", text),), "", c["skill"])
        for i, (text, c) in enumerate(zip(texts, made, strict=True))
    ]


def check(route: Route, keys: set[str]) -> None:
    weights = [weight for _, weight in route.experts]
    assert all(weight >= 0 for weight in weights)
    assert not weights or sum(weights) == pytest.approx(1)
    assert weights == sorted(weights, reverse=True)
    assert {key for key, _ in route.experts} <= keys
    assert len({key for key, _ in route.experts}) == len(weights)
    assert {candidate.expert for candidate in route.candidates} == keys
    assert route.reason


@pytest.mark.parametrize("name", plugins.names("router"))
class TestContract:
    def test_routes_are_sound(self, name: str, rows: list[Row], columns: Callable[..., Any]) -> None:
        experts = experts_for(rows)
        requests = requests_for(held_out(columns))
        routes = make(name, experts).route(requests)
        assert len(routes) == len(requests)
        for route in routes:
            check(route, {expert.key for expert in experts})

    def test_order_and_batch_make_no_difference(self, name: str, rows: list[Row], columns: Callable[..., Any]) -> None:
        requests = requests_for(held_out(columns, 20))
        router = make(name, experts_for(rows))
        together = router.route(requests)
        assert router.route(requests[::-1])[::-1] == together
        assert [router.route([request])[0] for request in requests] == together
        assert make(name, experts_for(rows)).route(requests) == together

    def test_order_of_experts_makes_no_difference(
        self, name: str, rows: list[Row], columns: Callable[..., Any]
    ) -> None:
        requests = requests_for(held_out(columns, 20))
        experts = experts_for(rows)
        one, other = make(name, experts).route(requests), make(name, experts[::-1]).route(requests)
        assert [route.experts for route in one] == [route.experts for route in other]

    def test_no_requests(self, name: str, rows: list[Row]) -> None:
        assert make(name, experts_for(rows)).route([]) == []

    def test_unknown_parameter_is_refused(self, name: str) -> None:
        with pytest.raises(NotFound, match="unknown parameter 'tpo'"):
            plugins.load("router", name).Options.from_mapping({"tpo": "1"})


@pytest.mark.parametrize("mode", ["centroid", "nearest"])
def test_centroid_finds_the_skill_of_new_prompts(mode: str, rows: list[Row], columns: Callable[..., Any]) -> None:
    requests = requests_for(held_out(columns, 100))
    routes = make("centroid", experts_for(rows), mode=mode).route(requests)
    right = sum(route.experts[:1] == ((f"x/{q.skill}", 1.0),) for q, route in zip(requests, routes, strict=True))
    assert right > 90
    assert "nearest skill" in routes[0].reason and "next" in routes[0].reason


@pytest.mark.parametrize("mode", ["centroid", "nearest"])
@pytest.mark.parametrize(
    "far",
    [
        "Explain how photosynthesis feeds a plant.",
        "def fibonacci(n): return n if n < 2 else fibonacci(n - 1)",
        "¿Dónde está la biblioteca?",
        "",
        "!!! ???",
    ],
)
def test_centroid_leaves_far_prompts_to_the_base(mode: str, far: str, rows: list[Row]) -> None:
    (route,) = make("centroid", experts_for(rows), mode=mode, strictness=1.0).route(
        [RouteRequest("far", (Message("user", far),))]
    )
    assert route.experts == ()
    assert "threshold" in route.reason
    assert len(route.candidates) == len(SKILLS)


def test_centroid_keeps_an_expert_of_two_skills_apart(rows: list[Row], columns: Callable[..., Any]) -> None:
    both = [row for row in rows if row.skill in ("casing", "city")]
    two = RoutableExpert("x/two", tuple(r.prompt for r in both), (), {}, tuple(str(r.skill) for r in both))
    router = make("centroid", [two, *experts_for(rows, ("arithmetic",))])
    assert [group.label for group in router.groups] == ["x/arithmetic", "casing", "city"]
    requests = requests_for([row for row in held_out(columns) if row.skill in ("casing", "city")])
    assert {route.experts[0][0] for route in router.route(requests)} == {"x/two"}


def test_centroid_weights_several_experts_by_their_cosines(rows: list[Row], columns: Callable[..., Any]) -> None:
    request = requests_for(held_out(columns, 5))
    for route in make("centroid", experts_for(rows), top=3, threshold=-1, temperature=0.5).route(request):
        assert len(route.experts) == 3
        assert [key for key, _ in route.experts] == [candidate.expert for candidate in route.candidates[:3]]


def test_centroid_refuses_what_it_cannot_place() -> None:
    with pytest.raises(BadInput, match="'empty' has no exemplars"):
        make("centroid", [RoutableExpert("empty", ())])
    with pytest.raises(NotFound, match="Did you mean 'lsa'"):
        make("centroid", [], embedder="lsaa")


def test_centroid_with_one_exemplar_each() -> None:
    router = make("centroid", [RoutableExpert("a", ("add numbers",)), RoutableExpert("b", ("name a city",))])
    (route,) = router.route([RouteRequest("1", (Message("user", "add the numbers"),))])
    assert route.experts == (("a", 1.0),)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), st.integers(0, 2**31), st.text())
def test_random_depends_on_seed_and_id_alone(keys: list[str], seed: int, request_id: str) -> None:
    experts = [RoutableExpert(key, ()) for key in keys]
    one = make("random", experts, seed=seed).route([RouteRequest(request_id, (Message("user", "a"),))])
    other = make("random", experts, seed=seed).route([RouteRequest(request_id, (Message("user", "b"),))])
    assert one == other


def test_random_draws_evenly() -> None:
    router = make("random", [RoutableExpert(key, ()) for key in "abcd"])
    routes = router.route([RouteRequest(str(i), ()) for i in range(4000)])
    for key in "abcd":
        assert 900 < sum(route.experts[0][0] == key for route in routes) < 1100


def test_fixed() -> None:
    experts = [RoutableExpert(key, ()) for key in ("a", "b", "c")]
    request = [RouteRequest("1", ())]
    assert make("fixed", experts, expert="b").route(request)[0].experts == (("b", 1.0),)
    assert make("fixed", experts, expert="base").route(request)[0].experts == ()
    assert make("fixed", experts, weights="a:1,c:3").route(request)[0].experts == (("c", 0.75), ("a", 0.25))
    assert [w for _, w in make("fixed", experts).route(request)[0].experts] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"expert": "bb"}, "unknown expert 'bb'"),
        ({"weights": "a:1,bb:2"}, "unknown expert 'bb'"),
        ({"weights": "a"}, "is not KEY:WEIGHT"),
        ({"weights": "a:-1"}, "is not KEY:WEIGHT"),
        ({"weights": "a:nan"}, "is not KEY:WEIGHT"),
        ({"weights": "a:1,a:2"}, "names an expert twice"),
        ({"expert": "a", "weights": "b:1"}, "exclude each other"),
    ],
)
def test_fixed_refuses(params: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make("fixed", [RoutableExpert("a", ()), RoutableExpert("b", ())], **params)


def test_oracle() -> None:
    router = make(
        "oracle",
        [
            RoutableExpert("made", (), ("sums",), {"sums": 0.2}),
            RoutableExpert("better", (), ("sums",), {"sums": 0.4}),
            RoutableExpert("profiled", (), ("other",), {"sums": 0.9, "maps": 0.1}),
        ],
    )

    def best(skill: str | None) -> tuple[tuple[str, float], ...]:
        return router.route([RouteRequest("1", (), skill)])[0].experts  # type: ignore[no-any-return]

    assert best("sums") == (("better", 1.0),)
    assert best("maps") == (("profiled", 1.0),)
    assert best("songs") == ()
    with pytest.raises(BadInput, match="needs the skill of prompt '1'"):
        best(None)
