"""What every aggregator keeps to, by its name in the seam."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.aggregators.scripted import ScriptedEngine, ask, encoding, made, named, question, routable
from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.aggregating import aggregate
from xpert.protocols import Question

NAMES = plugins.names("aggregator")
Noisy = Callable[[], ScriptedEngine]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("cook", {"mode": "top-down"}),
    ("b4", {"samples": 2, "rule": "codet"}),
    ("best-of", {"writers": "route", "under": "base"}),
    ("expert", {"expert": "b"}),
]
OPTIONS = "Which is it?\nA. red\nB. green\nC. blue\nD. white"


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())]))
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    found: tuple[str, dict[str, Any]] = request.param
    return found


def questions(temperature: float = 0.0) -> list[Question]:
    routes = [
        (("a", 0.5), ("b", 0.3), ("c", 0.2)),
        (("b", 0.5), ("c", 0.5)),
        (("a", 1.0),),
        (),
    ]
    return [
        question(f"{OPTIONS}\n(case {n})" if n % 2 else OPTIONS, routes[n % 4], id=f"q{n}", temperature=temperature)
        for n in range(8)
    ]


def test_the_class_says_what_it_is(variant: tuple[str, dict[str, Any]]) -> None:
    plugin = plugins.load("aggregator", variant[0])
    assert plugin.cost and plugin.source and isinstance(plugin.several, bool)
    assert "Cost:" in plugin.__doc__ and "Source:" in plugin.__doc__


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_equals_one_by_one(variant: tuple[str, dict[str, Any]], temperature: float, noisy: Noisy) -> None:
    name, params = variant
    asked = questions(temperature)
    together = [d.verdict for d in aggregate(noisy(), encoding(), made(name, **params), asked)]
    assert together == [ask(made(name, **params), one, noisy()) for one in asked]
    shuffled = random.Random(0).sample(asked, len(asked))
    others = aggregate(noisy(), encoding(), made(name, **params), shuffled, at_once=3)
    again = {d.question.id: d.verdict for d in others}
    assert together == [again[one.id] for one in asked]
    assert len({str(verdict) for verdict in together}) > 1


def test_verdicts_are_of_the_route_and_their_log_is_json(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    name, params = variant
    for dialogue in aggregate(noisy(), encoding(), made(name, **params), questions()):
        verdict = dialogue.verdict
        assert verdict is not None
        route = dict(dialogue.question.route.experts)
        assert {key for key, _ in verdict.experts} <= route.keys()
        weights = [weight for _, weight in verdict.experts]
        assert weights == sorted(weights, reverse=True) and all(weight >= 0 for weight in weights)
        assert not weights or sum(weights) == pytest.approx(1)
        assert verdict.reason and verdict.finished in ("stop", "length")
        assert json.loads(json.dumps(verdict.log, allow_nan=False)) == verdict.log


def test_the_order_of_experts_changes_nothing(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    name, params = variant
    asked = questions()
    turned = [dataclasses.replace(q, route=dataclasses.replace(q.route, experts=q.route.experts[::-1])) for q in asked]
    experts = [routable(key) for key in "cba"]
    first = aggregate(noisy(), encoding(), made(name, **params), asked)
    second = aggregate(noisy(), encoding(), made(name, experts=experts, **params), turned)
    assert [d.verdict for d in first] == [d.verdict for d in second]


def test_the_same_seed_gives_the_same(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    name, params = variant
    asked = questions(0.8)
    first, second = (aggregate(noisy(), encoding(), made(name, seed=3, **params), asked) for _ in range(2))
    assert [d.verdict for d in first] == [d.verdict for d in second]


def test_sampled_asks_draw_from_seeds_of_their_own(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    engine = noisy()
    aggregate(engine, encoding(), made(variant[0], **variant[1]), questions(0.8))
    seeds = [request.sampling.seed for request in engine.requests]
    assert None not in seeds and len(set(seeds)) == len(seeds)


def test_without_a_seed_nothing_is_seeded(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    engine = noisy()
    unseeded = [dataclasses.replace(q, sampling=dataclasses.replace(q.sampling, seed=None)) for q in questions()]
    aggregate(engine, encoding(), made(variant[0], **variant[1]), unseeded)
    assert {request.sampling.seed for request in engine.requests} == {None}


def test_all_requests_of_an_expert_go_together(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    engine = noisy()
    aggregate(engine, encoding(), made(variant[0], **variant[1]), questions())
    for call in engine.calls:
        blocks = [key for place, key in enumerate(call) if place == 0 or call[place - 1] != key]
        assert len(blocks) == len(set(blocks))
    for before, after in zip(engine.calls, engine.calls[1:], strict=False):
        assert before and after


def test_only_engine_keys_reach_the_engine(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    engine = noisy()
    keys = {key: f"{key}@1" for key in "abc"}
    aggregate(engine, encoding(keys=keys), made(variant[0], **variant[1]), questions())
    asked = {key for request in engine.requests for key, _ in request.experts}
    asked |= {key for request, _ in engine.weighed for key, _ in request.experts}
    assert asked <= set(keys.values()) and asked


def test_a_prompt_without_room_is_named(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    with pytest.raises(BadInput, match=r"the prompt has \d+ tokens") as raised:
        ask(made(variant[0], **variant[1]), question("long " * 50, id="q7"), noisy(), context=100)
    assert raised.value.where == "prompt q7"


@pytest.mark.parametrize("choices", [(), ("red", "green", "blue", "white")])
def test_what_fits_the_context_by_itself_is_answered(
    variant: tuple[str, dict[str, Any]], choices: tuple[str, ...], noisy: Noisy
) -> None:
    aggregator = made(variant[0], **variant[1])
    own = len(encoding().prompt(question("").messages))
    for room in (1, 20, 31, 33, 100, 150, 250, 400):
        one = question("w" * (600 - own - room), choices=choices, max_tokens=40)
        assert ask(aggregator, one, noisy(), context=600).reason, f"with room for {room} tokens"


def test_the_totals_are_of_all_replies(variant: tuple[str, dict[str, Any]], noisy: Noisy) -> None:
    engine = noisy()
    found = aggregate(engine, encoding(), made(variant[0], **variant[1]), questions())
    assert sum(dialogue.replies for dialogue in found) == len(engine.requests)
    prompts = sum(len(request.prompt_ids) for request in engine.requests)
    assert sum(dialogue.prompt_tokens for dialogue in found) == prompts
    assert all(dialogue.completion_tokens > 0 for dialogue in found)
    assert {named(request.experts) for request in engine.requests} > {"base"}
