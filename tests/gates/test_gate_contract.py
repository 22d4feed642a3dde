"""What every gate keeps to, whatever it weighs by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from xpert import plugins

ROWS, TOKENS = 5, 3
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")

# What is tried besides the defaults, per gate, and what a gate cannot do without.
NEEDED: dict[str, dict[str, Any]] = {"shared-experts": {"shared": "a"}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "arrow": [{"top": 1}, {"top": 0, "temperature": 0.5}],
    "phatgoose": [{"top": 1}, {"top": 3}],
    "average-activation": [{"top": 2, "temperature": 4.0}],
    "glider": [{"top_p": 0.6}, {"alpha": 100.0}],
    "softmax-top-k": [{"top": 0}, {"top": 1, "per": "block"}],
    "top-p": [{"p": 0.0}, {"p": 1.0}],
    "null-experts": [{"top": 1}, {"nulls": 1}],
    "shared-experts": [{"renormalise": False}],
    "rank-wise": [{"weigh": "sigmoid"}, {"top": 3}],
    "tree": [{"band": 8.0, "trees": 3}],
    "random-top-k": [{"top": 2}],
    "switches": [{"modules": ("q_proj",)}, {"layers": ("0",)}],
}
SUMS_TO_ONE = {"arrow", "phatgoose", "average-activation", "glider", "softmax-top-k", "top-p", "random-top-k", "tree"}


CASES = [
    pytest.param(name, NEEDED.get(name, {}) | options, id=f"{name}-{options}" if options else name)
    for name in plugins.names("gate")
    for options in ({}, *VARIANTS.get(name, []))
]
gates = pytest.mark.parametrize(("name", "options"), CASES)
modules = pytest.mark.parametrize("module", MODULES)


def hidden(rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TOKENS, 24, generator=torch.Generator().manual_seed(seed))


def allowed_sets(experts: int, rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    """bool [rows, 1, e]: all, none, one, and random sets."""
    drawn = torch.rand(rows, 1, experts, generator=torch.Generator().manual_seed(seed)) < 0.5
    drawn[0], drawn[1], drawn[2] = True, False, False
    drawn[2, 0, -1] = True
    return drawn


def biases(experts: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 1, experts, generator=torch.Generator().manual_seed(7))


def counts(gate: Any, module: str, experts: Sequence[Any]) -> list[int]:
    """How many weights each expert has: one, or one per rank."""
    if gate.grain == "expert":
        return [1] * len(experts)
    return [e.modules[module].rank if module in e.modules else 0 for e in experts]


def widened(allowed: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    return allowed.repeat_interleave(torch.tensor(sizes), dim=-1)


def present(module: str, experts: Sequence[Any]) -> torch.Tensor:
    return torch.tensor([module in e.modules for e in experts])


@pytest.mark.parametrize("name", plugins.names("gate"))
def test_a_gate_says_what_it_is(name: str) -> None:
    kind = plugins.load("gate", name)
    assert kind.learned in ("none", "expert", "mixture")
    assert kind.grain in ("expert", "rank")
    assert kind.cost and kind.source
    assert kind.__doc__


@gates
@modules
@pytest.mark.parametrize("biased", [False, True])
def test_weights_are_positive_where_allowed_and_zero_elsewhere(
    name: str, options: dict[str, Any], module: str, biased: bool, make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    gate = make_gate(name, experts, **options)
    assert isinstance(gate.site(module), str)
    allowed = allowed_sets(len(experts))
    weights = gate.at(module, experts)(hidden(), allowed, biases(len(experts)) if biased else None)
    sizes = counts(gate, module, experts)
    assert weights.shape == (ROWS, TOKENS, sum(sizes))
    assert weights.is_floating_point() and weights.isfinite().all()
    assert (weights >= 0).all()
    may = widened(allowed & present(module, experts), sizes)
    assert (weights[~may.expand_as(weights)] == 0).all()
    assert (weights[1] == 0).all(), "a row without experts gets none"
    if name in SUMS_TO_ONE:
        some = (allowed & present(module, experts)).any(-1)
        assert torch.allclose(weights.sum(-1), some.float().expand(-1, TOKENS), atol=1e-6)


@gates
@modules
def test_rows_and_tokens_are_decided_each_for_itself(
    name: str, options: dict[str, Any], module: str, make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    gate = make_gate(name, experts, **options).at(module, experts)
    states, allowed, bias = hidden(), allowed_sets(len(experts), seed=3), biases(len(experts))
    whole = gate(states, allowed, bias)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(gate(states[order], allowed[order], bias[order]), whole[order], atol=1e-6)
    alone = [gate(states[i : i + 1], allowed[i : i + 1], bias[i : i + 1]) for i in range(ROWS)]
    assert torch.allclose(torch.cat(alone), whole, atol=1e-6)
    tokens = [gate(states[:, t : t + 1], allowed, bias) for t in range(TOKENS)]
    assert torch.allclose(torch.cat(tokens, dim=1), whole, atol=1e-6)


@gates
def test_inputs_are_left_as_they_were(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    given = hidden(), allowed_sets(len(experts)), biases(len(experts))
    kept = [part.clone() for part in given]
    weights = make_gate(name, experts, **options).at(MODULES[0], experts)(*given)
    weights *= 0.5  # what comes back is the caller's own
    assert all(torch.equal(part, was) for part, was in zip(given, kept, strict=True))


@gates
def test_experts_not_allowed_make_no_difference_to_the_others(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    module, few = MODULES[0], experts[1:3]
    gate = make_gate(name, experts, **options)
    allowed = torch.tensor([False, True, True, False]).expand(ROWS, 1, -1)
    among = gate.at(module, experts)(hidden(), allowed, None)
    alone = gate.at(module, few)(hidden(), allowed[..., 1:3], None)
    before = counts(gate, module, experts)[0]
    assert torch.allclose(among[..., before : before + alone.shape[-1]], alone, atol=1e-6)


@gates
@modules
def test_the_order_of_the_experts_makes_no_difference(
    name: str, options: dict[str, Any], module: str, make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    order = [2, 0, 3, 1]
    gate = make_gate(name, experts, **options)
    allowed, bias = allowed_sets(4, seed=5), biases(4)
    straight = gate.at(module, experts)(hidden(), allowed, bias)
    turned = gate.at(module, [experts[i] for i in order])(hidden(), allowed[..., order], bias[..., order])
    places = torch.arange(straight.shape[-1]).split(counts(gate, module, experts))
    assert torch.allclose(turned, straight[..., torch.cat([places[i] for i in order])], atol=1e-6)


@gates
def test_one_expert_alone(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    one = experts[:1]
    gate = make_gate(name, experts, **options)
    weights = gate.at(MODULES[0], one)(hidden(), torch.tensor([[[True]]] * 4 + [[[False]]]), None)
    assert weights.isfinite().all() and (weights[4] == 0).all()
    if name in SUMS_TO_ONE:
        assert (weights[:4] == 1).all()


@gates
def test_a_module_that_none_of_the_experts_adapts(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    gate, only = make_gate(name, experts, **options), [experts[2]]  # without up_proj
    weights = gate.at(MODULES[1], only)(hidden(), torch.ones(ROWS, 1, 1).bool(), None)
    assert weights.shape == (ROWS, TOKENS, sum(counts(gate, MODULES[1], only))) and (weights == 0).all()


@gates
def test_half_precision_is_weighed_in_float32(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    gate = make_gate(name, experts, **options).at(MODULES[0], experts)
    rough = hidden().bfloat16()
    allowed, bias = allowed_sets(len(experts)), biases(len(experts))
    weights = gate(rough, allowed, bias)
    assert weights.isfinite().all() and (weights >= 0).all()
    # bfloat16 numbers are float32 numbers: the same states give the same weights.
    assert torch.allclose(weights.float(), gate(rough.float(), allowed, bias), atol=1e-6)


@gates
def test_gradients_are_finite(
    name: str, options: dict[str, Any], make_gate: Callable[..., Any], experts: list[Any]
) -> None:
    gate = make_gate(name, experts, **options)
    with torch.inference_mode():  # an engine serves so; what the gate keeps of it must not hinder training
        served = gate.at(MODULES[0], experts)(hidden(), allowed_sets(len(experts)), biases(len(experts)))
    states = hidden().requires_grad_()
    weights = gate.at(MODULES[0], experts)(states, allowed_sets(len(experts)), biases(len(experts)))
    assert torch.allclose(served, weights.detach(), atol=1e-6)
    if weights.requires_grad:
        (weights * torch.randn_like(weights)).sum().backward()
        assert states.grad is not None and states.grad.isfinite().all()
        assert (states.grad[1] == 0).all(), "a row without experts teaches nothing"
