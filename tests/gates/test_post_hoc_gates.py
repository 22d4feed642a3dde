"""The gates over ready experts: each one's formula, computed plainly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from xpert.errors import BadInput
from xpert.experts.adapters import LowRank
from xpert.experts.gates._choosing import softmax_allowed, softmax_top_k, softmax_top_p
from xpert.experts.gates.arrow import top_right_singular_vectors
from xpert.experts.gates.switches import SwitchesOptions

MODULE = "model.layers.0.self_attn.q_proj"
EVERYWHERE = torch.ones(1, 1, 4, dtype=torch.bool)


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def plainly(logits: list[float], allowed: list[bool], k: int) -> list[float]:
    order = sorted((i for i in range(len(logits)) if allowed[i]), key=lambda i: (-logits[i], i))[:k]
    weights = [0.0] * len(logits)
    total = sum(np.exp(logits[i] - logits[order[0]]) for i in order)
    for i in order:
        weights[i] = float(np.exp(logits[i] - logits[order[0]]) / total)
    return weights


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 10))
def test_top_k_is_the_plain_one_and_ties_go_to_the_lowest(data: st.DataObject, experts: int, k: int) -> None:
    few_values = st.sampled_from([-2.0, 0.0, 0.5, 3.0])  # so that there are ties
    rows = data.draw(st.lists(st.lists(few_values, min_size=experts, max_size=experts), min_size=1, max_size=4))
    masks = data.draw(st.lists(st.lists(st.booleans(), min_size=experts, max_size=experts), min_size=len(rows)))
    found = softmax_top_k(torch.tensor(rows), torch.tensor(masks[: len(rows)]), k)
    for weights, logits, allowed in zip(found.tolist(), rows, masks, strict=False):
        assert weights == pytest.approx(plainly(logits, allowed, k), abs=1e-6)


def test_temperature_divides_the_logits() -> None:
    logits, allowed = torch.tensor([1.0, 3.0, 2.0]), torch.ones(3, dtype=torch.bool)
    expected = torch.tensor([0.0, *torch.softmax(torch.tensor([1.5, 1.0]), 0).tolist()])
    assert torch.allclose(softmax_top_k(logits, allowed, 2, temperature=2.0), expected)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_equal_logits_leave_the_first_k(k: int) -> None:
    allowed = torch.tensor([False, *[True] * 7])
    weights = softmax_top_k(torch.zeros(2, 8), allowed, k)
    kept = min(k, 7)
    assert torch.allclose(weights, torch.tensor([0.0, *[1 / kept] * kept, *[0.0] * (7 - kept)]))


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.4]).log()
    allowed = torch.ones(3, dtype=torch.bool)
    assert torch.allclose(softmax_top_p(logits, allowed, 0.0), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(softmax_top_p(logits, allowed, 0.45), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(softmax_top_p(logits, allowed, 0.55), torch.tensor([0.0, 5 / 9, 4 / 9]))
    assert torch.allclose(softmax_top_p(logits, allowed, 0.95), torch.tensor([0.1, 0.5, 0.4]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_top_p_sums_to_one_and_at_one_keeps_all(seed: int, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, generator=generator) * 8
    allowed = torch.rand(6, 5, generator=generator) < 0.6
    weights = softmax_top_p(logits, allowed, p)
    assert torch.allclose(weights.sum(-1), allowed.any(-1).float(), atol=1e-6)
    assert not weights[~allowed].any()
    assert torch.equal(softmax_top_p(logits, allowed, 1.0), softmax_allowed(logits, allowed))


# ── arrow ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arrow_s_direction_is_the_top_right_singular_vector(experts: list[Any]) -> None:
    updates = [expert.modules[MODULE] for expert in experts]
    assert len({update.rank for update in updates}) == 4
    for update, found in zip(updates, top_right_singular_vectors(updates), strict=True):
        plain = torch.linalg.svd(update.b @ update.a).Vh[0]
        assert found.norm() == pytest.approx(1, abs=1e-6)
        assert abs(float(found @ plain)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_arrow_s_direction_does_not_depend_on_the_scale(experts: list[Any], scale: float) -> None:
    update = experts[0].modules[MODULE]
    scaled = LowRank(update.a * scale, update.b * scale)
    assert torch.allclose(*top_right_singular_vectors([update, scaled]).abs(), atol=1e-6)


def test_arrow_s_direction_of_dependent_rows_and_of_nothing() -> None:
    a = torch.zeros(3, 24)
    a[0, 2] = a[1, 2] = 1.0  # rank 1, written as three rows
    once = LowRank(a, torch.ones(20, 3))
    never = LowRank(torch.randn(3, 24), torch.zeros(20, 3))
    found = top_right_singular_vectors([once, never])
    assert torch.allclose(found[0].abs(), functional.one_hot(torch.tensor(2), 24).float(), atol=1e-6)
    assert not found[1].any()


def test_arrow_ignores_the_signs_of_both_matrices(
    experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor
) -> None:
    before = make_gate("arrow", experts).at(MODULE, experts)(states, EVERYWHERE, None)
    for flips in ((-1, 1), (1, -1), (-1, -1)):
        for expert in experts:
            update = expert.modules[MODULE]
            expert.modules[MODULE] = LowRank(flips[0] * update.a, flips[1] * update.b)
        after = make_gate("arrow", experts).at(MODULE, experts)(states, EVERYWHERE, None)
        assert torch.allclose(after, before, atol=1e-6)
    turned = make_gate("arrow", experts).at(MODULE, experts)(-states, EVERYWHERE, None)
    assert torch.allclose(turned, before, atol=1e-6)


def test_arrow_s_weights(experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor) -> None:
    weights = make_gate("arrow", experts, top=2, temperature=0.7).at(MODULE, experts)(states, EVERYWHERE, None)
    directions = [torch.linalg.svd(e.modules[MODULE].b @ e.modules[MODULE].a).Vh[0] for e in experts]
    logits = (states @ torch.stack(directions).T).abs()
    expected = softmax_top_k(logits, EVERYWHERE, 2, 0.7)
    assert torch.allclose(weights, expected, atol=1e-5)


def test_arrow_looks_for_a_direction_once_and_forgets_experts_that_are_gone(
    experts: list[Any], make_gate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts.gates import arrow

    asked: list[int] = []
    plain = arrow.top_right_singular_vectors
    monkeypatch.setattr(arrow, "top_right_singular_vectors", lambda u: asked.append(len(u)) or plain(u))
    gate = make_gate("arrow", experts)
    gate.at(MODULE, experts[:2])
    gate.at(MODULE, experts)
    gate.at(MODULE, experts[::-1])
    assert asked == [2, 2]
    assert len(gate._known) == 4
    del experts[1:]
    assert len(gate._known) == 1


def test_arrow_follows_an_expert_in_training(experts: list[Any], make_gate: Callable[..., Any]) -> None:
    update = experts[0].modules[MODULE]
    update.a.requires_grad_()
    gate = make_gate("arrow", experts)
    gate.at(MODULE, experts)
    with torch.no_grad():
        update.a.copy_(torch.randn(4, 24))
    found = gate.vectors(MODULE, experts)[0]
    assert torch.allclose(found, top_right_singular_vectors([update])[0])


# ── gates with vectors of the expert ─────────────────────────────────────────────────────────────────────────────


def vectors(experts: list[Any], name: str) -> torch.Tensor:
    return torch.stack([expert.gate_tensors[f"{name}.{MODULE}"] for expert in experts])


def test_phatgoose_s_weights(experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor) -> None:
    weights = make_gate("phatgoose", experts).at(MODULE, experts)(states, EVERYWHERE, None)
    own = functional.layer_norm(vectors(experts, "phatgoose"), (24,))
    logits = functional.layer_norm(states, (24,)) @ own.T / 24**0.5
    assert torch.allclose(weights, softmax_top_k(logits, EVERYWHERE, 2), atol=1e-6)
    # The same as the softmax over all, cut and renormalised.
    whole = torch.softmax(logits, -1)
    cut = whole * (weights > 0)
    assert torch.allclose(weights, cut / cut.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_zero_phatgoose_vectors_share_a_token_evenly(
    experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor, top: int
) -> None:
    for expert in experts:
        expert.gate_tensors = {name: torch.zeros_like(vector) for name, vector in expert.gate_tensors.items()}
    for name in ("phatgoose", "average-activation", "glider"):
        weights = make_gate(name, experts, top=top).at(MODULE, experts)(states, EVERYWHERE, None)
        expected = torch.tensor([1 / top] * top + [0.0] * (4 - top))
        assert torch.allclose(weights, expected.expand_as(weights)), name


def test_average_activation_s_weights(experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor) -> None:
    gate = make_gate("average-activation", experts, temperature=3.0)
    logits = states @ vectors(experts, "average-activation").T  # a mean's sign counts
    assert torch.allclose(gate.at(MODULE, experts)(states, EVERYWHERE, None), torch.softmax(logits / 3, -1), atol=1e-5)


def test_glider_adds_the_request_s_cosines(
    experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor
) -> None:
    own = functional.layer_norm(vectors(experts, "phatgoose"), (24,))
    logits = functional.layer_norm(states, (24,)) @ own.T / 24**0.5
    cosines = torch.tensor([[0.9, 0.1, 0.0, -0.4], [0.0, 0.2, 0.3, 0.8], [0.0, 0.0, 0.0, 0.0]]).unsqueeze(1)
    found = make_gate("glider", experts, alpha=5.0, top=3).at(MODULE, experts)(states, EVERYWHERE, cosines)
    assert torch.allclose(found, softmax_top_k(logits + 5 * cosines, EVERYWHERE, 3), atol=1e-5)
    cut = make_gate("glider", experts, alpha=5.0, top_p=0.5).at(MODULE, experts)(states, EVERYWHERE, cosines)
    assert torch.allclose(cut, softmax_top_p(logits + 5 * cosines, EVERYWHERE, 0.5), atol=1e-5)
    local = make_gate("phatgoose", experts).at(MODULE, experts)(states, EVERYWHERE, None)
    assert torch.equal(make_gate("glider", experts).at(MODULE, experts)(states, EVERYWHERE, None), local)


# ── switches ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "module", "acts"),
    [
        ({}, MODULE, True),
        ({"modules": ("q_proj",)}, MODULE, True),
        ({"modules": ("self_attn.*",)}, MODULE, True),
        ({"modules": ("proj",)}, MODULE, False),
        ({"modules": ("up_proj", "q_*")}, MODULE, True),
        ({"modules": ("mlp.*",)}, MODULE, False),
        ({"modules": (MODULE,)}, MODULE, True),
        ({"layers": ("0",)}, MODULE, True),
        ({"layers": ("1-3", "5")}, MODULE, False),
        ({"layers": ("1-3", "5")}, "transformer.h.5.attn.c_attn", True),
        ({"layers": ("1-3",)}, "transformer.h.2.attn.c_attn", True),
        ({"layers": ("0-3",)}, "model.head", False),
        ({"layers": ("0",), "modules": ("up_proj",)}, MODULE, False),
    ],
)
def test_where_experts_are_switched_on(options: dict[str, Any], module: str, acts: bool) -> None:
    assert SwitchesOptions.from_mapping(options).acts_in(module) is acts


def test_switches_give_weight_one_where_they_are_on(
    experts: list[Any], make_gate: Callable[..., Any], states: torch.Tensor
) -> None:
    allowed = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]).unsqueeze(1)
    everywhere = make_gate("switches", experts)
    assert torch.equal(everywhere.at(MODULE, experts)(states, allowed, None), allowed.float().expand(3, 5, 4))
    up = "model.layers.0.mlp.up_proj"  # which expert c does not have
    has_it = torch.tensor([True, True, False, True])
    expected = (allowed & has_it).float().expand(3, 5, 4)
    assert torch.equal(everywhere.at(up, experts)(states, allowed, None), expected)
    attention = make_gate("switches", experts, modules=("self_attn.*",))
    assert not attention.at(up, experts)(states, allowed, None).any()
    assert torch.equal(attention.at(MODULE, experts)(states, allowed, None), allowed.float().expand(3, 5, 4))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _forget_all(expert: Any) -> None:
    expert.gate_tensors = {}


def _forget_one(expert: Any) -> None:
    expert.gate_tensors = {k: v for k, v in expert.gate_tensors.items() if "layers.0.self_attn" not in k}


def _shorten(expert: Any) -> None:
    expert.gate_tensors = {name: vector[:-1] for name, vector in expert.gate_tensors.items()}


@pytest.mark.parametrize(
    ("gate", "options", "spoil", "message"),
    [
        (
            "phatgoose",
            {},
            _forget_all,
            "'b' has no phatgoose vectors. Make them with `xpert gate EXPERT ROWS --name ph",
        ),
        ("glider", {}, _forget_all, "'b' has no phatgoose vectors. Make them with `xpert gate"),
        (
            "average-activation",
            {},
            _forget_all,
            "no average-activation vectors.*`xpert gate.*--name average-activation",
        ),
        ("phatgoose", {}, _forget_one, f"'b' has no phatgoose vector for {MODULE}"),
        ("phatgoose", {}, _shorten, r"of expert 'b' for model.* is \[23\], not \[24\]"),
        ("switches", {"modules": ("o_proj",)}, None, "'a' adapts no module that .* has q_proj, up_proj"),
        ("switches", {"layers": ("7-9",)}, None, "'a' adapts no module that the gate switches on"),
        ("switches", {"layers": ("3-1",)}, None, "layers '3-1' is not understood. Write numbers and ranges"),
        ("switches", {"layers": ("top",)}, None, "layers 'top' is not understood"),
        ("switches", {"modules": ()}, None, "modules is empty"),
        ("arrow", {"top": -1}, None, "top is -1; the least is 0"),
        ("arrow", {"temperature": 0.0}, None, "temperature is 0.0; the least is"),
        ("arrow", {"k": 2}, None, "unknown .*'k'"),
        ("glider", {"top": 3, "top_p": 0.5}, None, "top and top-p are both given"),
        ("glider", {"top_p": 1.5}, None, "top-p is 1.5; the most is 1"),
    ],
)
def test_mistakes(
    gate: str,
    options: dict[str, Any],
    spoil: Callable[[Any], None] | None,
    message: str,
    experts: list[Any],
    make_gate: Callable[..., Any],
) -> None:
    if spoil:
        spoil(experts[1])
    with pytest.raises(BadInput) as caught:
        make_gate(gate, experts, **options).at(MODULE, experts)
    assert re.search(message, str(caught.value)), str(caught.value)
