"""The contract of routers that learn from observations."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.observing import SKILLS, experts_of, learned, observed, opened, request, requests_of
from xpert import plugins
from xpert.errors import BadInput, Corrupt
from xpert.experts.router_state import read_router_state, write_router_state
from xpert.protocols import Observations, RoutableExpert, RouteRequest, RouterState
from xpert.records import Message, Row

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("category", {}),
    ("category", {"classifier": "knn", "budget": "0.5"}),
    ("category", {"categories": "clusters", "clusters": "5"}),
    ("tryage", {}),
    ("tryage", {"head": "mlp", "epochs": "20", "predict": "score", "size_weight": "0.1"}),
    ("mf", {"epochs": "10"}),
    ("mf", {"epochs": "5", "constant": "false", "ties": "loss", "dim": "8"}),
    ("cascade", {}),
    ("cascade", {"mode": "before", "router": "tryage", "share": "0.4"}),
    ("cascade", {"weak": "x/casing", "strong": "base", "share": "0.2"}),
]
each_way = pytest.mark.parametrize(("name", "params"), WAYS, ids=[f"{n}-{'-'.join(p.values())}" for n, p in WAYS])


@pytest.fixture
def experts(rows: list[Row]) -> list[RoutableExpert]:
    return experts_of(rows)


@pytest.fixture
def seen(rows: list[Row], experts: list[RoutableExpert]) -> Observations:
    return observed(experts, requests_of(rows[:120]), noise=0.1)


@pytest.fixture
def asked(columns: Callable[..., Any]) -> list[RouteRequest]:
    """New prompts, and some that are like none."""
    new = [
        RouteRequest(f"n{c['id']}", (Message("user", f"{c['instruction']}\n\n{c['input']}"),))
        for c in columns(20, seed=5)
    ]
    return [*new, request("¿Dónde está la biblioteca?", "far"), request("", "empty")]


def shuffled(seen: Observations, columns: list[int], rows: list[int]) -> Observations:
    assert seen.confidences is not None
    part = np.ix_(rows, columns)
    return Observations(
        tuple(seen.requests[row] for row in rows),
        tuple(seen.subjects[column] for column in columns),
        seen.scores[part],
        seen.losses[part],
        seen.confidences[part],
    )


def same_state(one: RouterState, other: RouterState) -> bool:
    return (
        one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


@each_way
class TestContract:
    def test_a_state_comes_back_from_its_file(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any, asked: Any, tmp_path: Path
    ) -> None:
        router, state = learned(name, experts, seen, **params)
        write_router_state(tmp_path / "router.safetensors", state)
        back = read_router_state(tmp_path / "router.safetensors")
        assert same_state(back, state)
        assert opened(name, experts, back, **params).route(asked) == router.route(asked)

    def test_the_same_input_gives_the_same_state(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any
    ) -> None:
        assert same_state(learned(name, experts, seen, **params)[1], learned(name, experts, seen, **params)[1])

    def test_order_changes_nothing(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any, asked: Any
    ) -> None:
        router, state = learned(name, experts, seen, **params)
        turned = shuffled(seen, [1, 3, 0, 2], list(range(len(seen.requests)))[::-1])
        other, other_state = learned(name, experts[::-1], turned, **params)
        assert same_state(state, other_state)
        assert other.route(asked) == router.route(asked)
        assert opened(name, experts[::-1], state, **params).route(asked) == router.route(asked)

    def test_a_batch_equals_single_prompts(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any, asked: Any
    ) -> None:
        router, _ = learned(name, experts, seen, **params)
        together = router.route(asked)
        assert [router.route([one])[0] for one in asked] == together
        assert router.route(asked[::-1])[::-1] == together
        assert router.route([]) == []

    def test_an_expert_that_was_not_observed_is_refused(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any, rows: list[Row]
    ) -> None:
        _, state = learned(name, experts, seen, **params)
        with pytest.raises(BadInput, match=f"router {name} has not learned expert 'x/colour'"):
            opened(name, [*experts, *experts_of(rows, ("colour",))], state, **params)

    def test_an_expert_may_go(self, name: str, params: dict[str, Any], experts: Any, seen: Any, asked: Any) -> None:
        """Without an expert that was observed, the others are chosen among."""
        _, state = learned(name, experts, seen, **params)
        fewer = [expert for expert in experts if expert.key != "x/arithmetic"]
        for route in opened(name, fewer, state, **params).route(asked):
            assert "x/arithmetic" not in {key for key, _ in route.experts}
            assert "x/arithmetic" not in {candidate.expert for candidate in route.candidates}

    def test_other_options_than_it_was_trained_with_are_refused(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any
    ) -> None:
        _, state = learned(name, experts, seen, **params)
        other = {"weak": "x/reversal"} if name == "cascade" else {"embedder": "minilm"}
        facts = {**state.facts, "options": {**state.facts["options"], **other}}
        with pytest.raises(BadInput, match=rf"was trained with {next(iter(other))}={next(iter(other.values()))}, and"):
            opened(name, experts, RouterState(state.tensors, facts), **params)

    def test_a_state_of_another_router_or_a_broken_one_is_refused(
        self, name: str, params: dict[str, Any], experts: Any, seen: Any
    ) -> None:
        _, state = learned(name, experts, seen, **params)
        with pytest.raises(BadInput, match="the state is one of router 'other'"):
            opened(name, experts, RouterState(state.tensors, {**state.facts, "router": "other"}), **params)
        for broken in (
            RouterState(state.tensors, {**state.facts, "format": 99}),
            RouterState(state.tensors, {k: v for k, v in state.facts.items() if k != "subjects"}),
        ):
            with pytest.raises(Corrupt):
                opened(name, experts, broken, **params)
        for tensor in state.tensors:
            rest = {other: value for other, value in state.tensors.items() if other != tensor}
            with pytest.raises(Corrupt):
                opened(name, experts, RouterState(rest, state.facts), **params)


@pytest.mark.parametrize("name", ["category", "tryage", "mf", "cascade"])
def test_a_router_without_a_state_is_not_ready(name: str, experts: Any, asked: Any) -> None:
    kind = plugins.load("router", name)
    router = kind(kind.Options())
    with pytest.raises(BadInput, match=rf"router {name} has to be trained .* xpert router train"):
        router.prepare(experts)
    with pytest.raises(BadInput, match="has to be trained"):
        router.route(asked)


@pytest.mark.parametrize("name", ["category", "tryage", "mf", "cascade"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: shuffled(s, [0, 1, 3], [0, 1]), "'x/reversal' was not observed"),
        (lambda s: shuffled(s, [0, 1, 2], [0, 1]), "'base' was not observed"),
        (lambda s: dataclasses.replace(s, subjects=(*s.subjects[:3], "y")), "'base' was not observed"),
        (lambda s: shuffled(s, [0, 1, 2, 3], []), "no observations to learn from"),
        (lambda s: dataclasses.replace(s, scores=s.scores[:5]), r"scores have the shape \(5, 4\), and not \(120, 4\)"),
        (lambda s: dataclasses.replace(s, losses=s.losses[:, :2]), "losses have the shape"),
        (
            lambda s: dataclasses.replace(s, scores=s.scores * np.nan, losses=s.losses * np.nan),
            "the observed (score|loss) of 'x/arithmetic' on prompt 'r00000' is nan",
        ),
    ],
)
def test_observations_that_do_not_fit_are_refused(
    name: str, change: Callable[[Observations], Observations], message: str, experts: Any, seen: Any
) -> None:
    with pytest.raises(BadInput, match=message):
        learned(name, experts, change(seen))


@pytest.mark.parametrize("name", ["category", "tryage", "mf"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_prompts_are_enough_to_learn_from(name: str, count: int, rows: list[Row], experts: Any, asked: Any) -> None:
    router, state = learned(name, experts, observed(experts, requests_of(rows[:count])))
    assert opened(name, experts, state).route(asked) == router.route(asked)


@pytest.mark.parametrize("name", ["category", "tryage", "mf"])
def test_equal_experts_and_empty_prompts_are_learned(name: str, experts: Any, asked: Any) -> None:
    """Nothing tells the prompts apart: then the best over all answers."""
    blank = [RouteRequest(str(place), (Message("user", " "),), "none") for place in range(6)]
    table = np.tile([0.2, 0.7, 0.7, 0.5], (6, 1))
    seen = Observations(tuple(blank), (*(expert.key for expert in experts), "base"), table, 1 - table)
    router, _ = learned(name, experts, seen)
    assert {route.experts for route in router.route(asked)} <= {(("x/casing", 1.0),), (("x/reversal", 1.0),)}


@pytest.mark.parametrize("name", ["category", "tryage", "mf"])
def test_no_experts(name: str, rows: list[Row], asked: Any) -> None:
    seen = observed([], requests_of(rows[:20]))
    if name == "mf":
        with pytest.raises(BadInput, match="does one subject beat another"):
            learned(name, [], seen)
        return
    router, _ = learned(name, [], seen)
    assert all(route.experts == () and route.candidates == () for route in router.route(asked))


def test_a_minilm_state_says_which_model_it_was(experts: Any, seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedder comes trained, so that the state holds its identity and nothing more of it."""
    from xpert.embedders import lsa

    class Trained:
        identity = "trained/1"

        def fit(self, texts: Any) -> None:
            pass

        def embed(self, texts: Any) -> Any:
            return np.array([[len(text) % 7, 1.0] for text in texts], np.float32) / 8

    monkeypatch.setattr(lsa, "PLUGIN", lambda context: Trained())
    router, state = learned("tryage", experts, seen)
    assert not any(name.startswith("embedder.") for name in state.tensors)
    assert opened("tryage", experts, state).route([request("a")]) == router.route([request("a")])
    monkeypatch.setattr(Trained, "identity", "trained/2")
    with pytest.raises(BadInput, match="learned with embeddings of trained/1, and here is trained/2"):
        opened("tryage", experts, state)


def test_routing_imports_no_torch(experts: Any, seen: Any, tmp_path: Path) -> None:
    """Applying what mf and a network learned needs numpy alone."""
    for name, params in (("mf", {"epochs": 2}), ("tryage", {"head": "mlp", "epochs": 2})):
        write_router_state(tmp_path / name, learned(name, experts, seen, **params)[1])
    code = f"""
import sys
from pathlib import Path
from xpert import plugins
from xpert.experts.router_state import read_router_state
from xpert.protocols import RoutableExpert, RouteRequest
from xpert.records import Message
for name, params in (("mf", {{}}), ("tryage", {{"head": "mlp"}})):
    kind = plugins.load("router", name)
    router = kind(kind.Options.from_mapping(params), state=read_router_state(Path({str(tmp_path)!r}) / name))
    router.prepare([RoutableExpert(key, ()) for key in {[f"x/{skill}" for skill in SKILLS]!r}])
    assert router.route([RouteRequest("1", (Message("user", "Add the two numbers."),))])[0].reason
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
