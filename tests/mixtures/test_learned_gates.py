"""Learned gates: each equals a plain loop over tokens, and keeps what it promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.adapters import LowRank
from xpert.experts.gates._learned_choice import top_k, top_p
from xpert.experts.gates._learned_trees import leaf_shares, smooth_step

WIDTH, TOKENS = 12, 4
BLOCK = "model.layers.0.mlp"
MODULE = f"{BLOCK}.gate_proj"
LEARNED = ["softmax-top-k", "top-p", "null-experts", "shared-experts", "rank-wise", "tree", "random-top-k"]


@dataclass(eq=False)
class Expert:
    key: str
    modules: dict[str, LowRank]
    gate_tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def experts(*ranks: int, modules: tuple[str, ...] = (MODULE,)) -> list[Expert]:
    return [
        Expert("abcdefghij"[i], {m: LowRank(torch.randn(rank, WIDTH), torch.randn(5, rank)) for m in modules})
        for i, rank in enumerate(ranks)
    ]


def gate(name: str, members: list[Expert], spread: float = 0.4, **options: Any) -> Any:
    """A gate begun for these experts, its router wide enough for weights to differ."""
    kind = plugins.load("gate", name)
    made = kind(kind.Options.from_mapping(options), experts=[e.key for e in members])
    widths = {module: WIDTH for e in members for module in e.modules}
    made.begin(widths, members, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    for key, tensor in made.tensors.items():
        if tensor.is_floating_point():
            made.tensors[key] = torch.randn(tensor.shape, generator=generator) * spread
    return made


def states(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def softmax(numbers: dict[int, float]) -> dict[int, float]:
    most = max(numbers.values(), default=0.0)
    parts = {i: math.exp(v - most) for i, v in numbers.items()}
    return {i: v / sum(parts.values()) for i, v in parts.items()}


def best(numbers: dict[int, float], k: int) -> list[int]:
    return sorted(numbers, key=lambda i: (-numbers[i], i))[: k or len(numbers)]


# ── one token at a time, as the papers write it ──────────────────────────────────────────────────────────────────


def plain(name: str, made: Any, members: list[Expert], x: torch.Tensor, allowed: list[bool]) -> list[float]:
    options, tensors = made.options, made.tensors
    n = len(members)
    if name == "rank-wise":
        return plain_ranks(made, members, x, allowed)
    if name == "tree":
        return plain_tree(made, n, x, allowed)
    logits = {i: float(tensors[f"{MODULE}.router"][i] @ x) for i in range(n) if allowed[i]}
    weights = [0.0] * n
    if not logits:
        return weights
    if name in ("softmax-top-k", "random-top-k"):
        chosen = best(logits, options.top)
        found = softmax({i: logits[i] for i in chosen})
    elif name == "top-p":
        p, found, mass = softmax(logits), {}, 0.0
        for i in best(p, 0):
            found[i] = p[i]
            mass += p[i]
            if mass > options.p:
                break
        if options.renormalise:
            found = {i: v / sum(found.values()) for i, v in found.items()}
    elif name == "null-experts":
        logits |= {n + j: float(row @ x) for j, row in enumerate(tensors[f"{MODULE}.nulls"])}
        found = softmax({i: logits[i] for i in best(logits, options.top) if i < n})
    else:
        shared = [i for i, e in enumerate(members) if e.key in options.shared]
        routed = {i: v for i, v in logits.items() if i not in shared}
        found = softmax({i: routed[i] for i in best(routed, options.top)})
        found |= {i: 1.0 for i in shared if allowed[i]}
    for i, weight in found.items():
        weights[i] = weight
    return weights


def plain_ranks(made: Any, members: list[Expert], x: torch.Tensor, allowed: list[bool]) -> list[float]:
    logits, scores, index = {}, {}, 0
    for place, expert in enumerate(members):
        for r in range(expert.modules[MODULE].rank):
            if allowed[place]:
                logits[index] = float(made.tensors[f"{MODULE}.router.{place}"][r] @ x)
                scores[index] = logits[index] + float(made.tensors[f"{MODULE}.balance.{place}"][r])
            index += 1
    found = softmax({i: logits[i] for i in best(scores, made.options.top)})
    return [found.get(i, 0.0) * made.options.strength for i in range(index)]


def plain_tree(made: Any, n: int, x: torch.Tensor, allowed: list[bool]) -> list[float]:
    leaves, splits, band = made.tensors[f"{MODULE}.leaves"], made.tensors[f"{MODULE}.splits"], made.options.band
    weights = [0.0] * n

    def inside(tree: int, node: int) -> bool:
        if node >= n - 1:
            return allowed[int(leaves[tree][node - (n - 1)])]
        return inside(tree, 2 * node + 1) or inside(tree, 2 * node + 2)

    def walk(tree: int, node: int, share: float) -> None:
        if not inside(tree, node):
            return
        if node >= n - 1:
            weights[int(leaves[tree][node - (n - 1)])] += share / len(leaves)
            return
        t = float(splits[tree * (n - 1) + node] @ x)
        right = 0.0 if t <= -band / 2 else 1.0 if t >= band / 2 else -2 * t**3 / band**3 + 3 * t / (2 * band) + 0.5
        if not inside(tree, 2 * node + 2):
            right = 0.0
        elif not inside(tree, 2 * node + 1):
            right = 1.0
        walk(tree, 2 * node + 1, share * (1 - right))
        walk(tree, 2 * node + 2, share * right)

    for tree in range(len(leaves)):
        walk(tree, 0, 1.0)
    return weights


CASES: list[tuple[str, dict[str, Any]]] = [
    ("softmax-top-k", {}),
    ("softmax-top-k", {"top": 0}),
    ("top-p", {"p": 0.6}),
    ("top-p", {"p": 0.6, "renormalise": False}),
    ("null-experts", {"top": 3, "nulls": 3}),
    ("shared-experts", {"shared": ("b",), "top": 1}),
    ("rank-wise", {"top": 3, "strength": 3.0}),
    ("tree", {"trees": 3, "band": 2.0}),
    ("random-top-k", {"top": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("count", [2, 5])
def test_a_gate_equals_its_plain_form(name: str, options: dict[str, Any], count: int) -> None:
    members = experts(*[1, 3, 2, 4, 2][:count])
    made = gate(name, members, **options)
    hidden = states(3)
    allowed = torch.ones(3, 1, count, dtype=torch.bool)
    allowed[1, 0, 0], allowed[2, 0, :] = False, False
    weights = made.at(MODULE, members)(hidden, allowed, None)
    for row, token in itertools.product(range(3), range(TOKENS)):
        expected = plain(name, made, members, hidden[row, token], allowed[row, 0].tolist())
        assert weights[row, token].tolist() == pytest.approx(expected, abs=1e-5)
    assert (weights[2] == 0).all()


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("rank-wise", "tree")])
def test_a_bias_is_added_to_the_logits(name: str, options: dict[str, Any]) -> None:
    members = experts(2, 2, 2)
    made = gate(name, members, **options)
    bias = torch.tensor([[[0.3, -1.0, 0.8]]]).repeat(3, 1, 1)
    found = made.at(MODULE, members)(states(), torch.ones(3, 1, 3, dtype=torch.bool), bias)
    ones = torch.cat([states(), torch.ones(3, TOKENS, 1)], dim=-1)
    router = made.tensors[f"{MODULE}.router"]
    made.tensors[f"{MODULE}.router"] = torch.cat([router, bias[0].T], dim=1)
    if name == "null-experts":
        nulls = made.tensors[f"{MODULE}.nulls"]
        made.tensors[f"{MODULE}.nulls"] = torch.cat([nulls, torch.zeros(len(nulls), 1)], dim=1)
    wider = made.at(MODULE, members)(ones, torch.ones(3, 1, 3, dtype=torch.bool), None)
    assert torch.allclose(found, wider, atol=1e-6)


def test_a_tree_s_bias_multiplies_and_keeps_zeros() -> None:
    members = experts(2, 2, 2, 2)
    at = gate("tree", members, spread=1.0).at(MODULE, members)
    allowed, bias = torch.ones(3, 1, 4, dtype=torch.bool), torch.tensor([1.0, -2.0, 0.0, 3.0]).expand(3, 1, 4)
    before, after = at(states(), allowed, None), at(states(), allowed, bias)
    expected = before * bias.exp()
    assert torch.allclose(after, expected / expected.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(after == 0, before == 0) and (before == 0).any()


@pytest.mark.parametrize("name", LEARNED)
def test_a_subset_in_another_order_is_a_mask(name: str) -> None:
    members = experts(2, 3, 1, 2)
    made = gate(name, members, **({"shared": ("b",)} if name == "shared-experts" else {}))
    some = [members[2], members[1]]
    alone = made.at(MODULE, some)(states(), torch.ones(3, 1, 2, dtype=torch.bool), None)
    mask = torch.tensor([False, True, True, False]).expand(3, 1, 4)
    whole = made.at(MODULE, members)(states(), mask, None)
    pick = [5, 2, 3, 4] if name == "rank-wise" else [2, 1]
    assert torch.allclose(alone, whole[..., pick], atol=1e-6)


def test_zero_routers_halve_between_two() -> None:
    members = experts(2, 2, 2)
    weights = gate("softmax-top-k", members, spread=0.0).at(MODULE, members)(
        states(), torch.ones(3, 1, 3, dtype=torch.bool), None
    )
    assert torch.equal(weights, torch.tensor([0.5, 0.5, 0.0]).expand_as(weights))


def test_top_p_keeps_one_at_least_and_all_at_one() -> None:
    members = experts(2, 2, 2, 2)
    allowed = torch.ones(3, 1, 4, dtype=torch.bool)
    least = gate("top-p", members, p=0.0).at(MODULE, members)(states(), allowed, None)
    assert ((least > 0).sum(-1) == 1).all()
    most = gate("top-p", members, p=1.0).at(MODULE, members)(states(), allowed, None)
    assert (most > 0).all()


def test_a_token_of_null_experts_gets_nothing() -> None:
    members = experts(2, 2)
    made = gate("null-experts", members, nulls=2, top=2)
    made.tensors[f"{MODULE}.router"] = torch.full((2, WIDTH), -5.0)
    made.tensors[f"{MODULE}.nulls"] = torch.full((2, WIDTH), 5.0)
    allowed = torch.ones(3, 1, 2, dtype=torch.bool)
    weights = made.at(MODULE, members)(states().abs(), allowed, None)
    assert (weights == 0).all()
    assert torch.allclose(made.at(MODULE, members)(-states().abs(), allowed, None).sum(-1), torch.ones(3, TOKENS))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=1, max_size=8), st.integers(0, 9), st.data())
def test_top_k_takes_the_lowest_index_of_equals(scores: list[float], k: int, data: Any) -> None:
    allowed = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = top_k(torch.tensor(scores), torch.tensor(allowed), k)
    expected = best({i: v for i, v in enumerate(scores) if allowed[i]}, k)
    assert found.nonzero().flatten().tolist() == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(0, 1))
def test_top_p_takes_the_smallest_set_beyond_the_mass(logits: list[float], mass: float) -> None:
    p = torch.softmax(torch.tensor(logits), -1)
    kept = top_p(p, torch.ones(len(logits), dtype=torch.bool), mass)
    assert kept.any()
    if not kept.all():
        assert p[kept].sum() > mass - 1e-5
        assert p[kept].min() >= p[~kept].max()
        assert p[kept].sum() - p[kept].min() <= mass + 1e-5 or kept.sum() == 1


@settings(max_examples=30, deadline=None)
@given(st.floats(-4, 4), st.floats(0.1, 4))
def test_the_smooth_step_closes_exactly(t: float, band: float) -> None:
    found = float(smooth_step(torch.tensor(t, dtype=torch.float64), band))
    assert 0 <= found <= 1
    if abs(t) >= band / 2:
        assert found == (1.0 if t > 0 else 0.0)
    assert float(smooth_step(torch.tensor(-t, dtype=torch.float64), band)) == pytest.approx(1 - found)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_each_tree_s_leaves_add_up_to_one(leaves: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(2, 3, 2, leaves - 1, generator=generator)
    allowed = torch.rand(2, 1, 2, leaves, generator=generator) < 0.6
    shares = leaf_shares(right, allowed)
    some = allowed.any(-1).expand(2, 3, 2)
    assert torch.allclose(shares.sum(-1), some.float(), atol=1e-6)
    assert (shares[~allowed.expand_as(shares)] == 0).all()


# ── where and when ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_feed_forward_block_is_routed_once() -> None:
    names = tuple(f"{BLOCK}.{part}" for part in ("gate_proj", "up_proj", "down_proj"))
    attention = "model.layers.0.self_attn.o_proj"
    members = experts(2, 2, modules=(*names[1:], attention))  # gate_proj itself has no expert
    kind = plugins.load("gate", "softmax-top-k")
    made = kind(kind.Options(per="block"), experts=["a", "b"])
    made.begin(dict.fromkeys((*names, attention), WIDTH), members, torch.Generator())
    assert {made.site(name) for name in names[1:]} == {names[0]}
    assert made.site(attention) == attention
    assert set(made.tensors) == {f"{names[0]}.router", f"{attention}.router"}
    alone = gate("softmax-top-k", members, per="layer")
    assert [alone.site(name) for name in names[1:]] == list(names[1:])


def test_the_fixed_router_takes_more_experts_step_by_step() -> None:
    members = experts(2, 2, 2, 2)
    made = gate("random-top-k", members)
    at, allowed, seen = made.at(MODULE, members), torch.ones(3, 1, 4, dtype=torch.bool), []
    for done in range(10):
        made.before_step(done, 10)
        seen.append(int((at(states(), allowed, None) > 0).sum(-1).max()))
    assert (seen[0], seen[-1]) == (1, 4)
    assert seen == sorted(seen) and set(seen) == {1, 2, 3, 4}
    assert not any(made.trains(name) for name in made.tensors)


def test_the_bias_moves_the_load_towards_its_mean() -> None:
    members = experts(2, 2)
    made = gate("rank-wise", members, spread=0.2, top=1, speed=0.01)
    made.tensors |= {f"{MODULE}.balance.{place}": torch.zeros(2) for place in range(2)}
    made.tensors[f"{MODULE}.router.0"][0] += 0.5  # a rank that nearly all want
    hidden = states(64).abs()
    mask, allowed = torch.ones(64, TOKENS, dtype=torch.bool), torch.ones(64, 1, 2, dtype=torch.bool)
    decide, spreads = made.decide(MODULE, members), []
    for _ in range(400):
        routing = decide(hidden, allowed, None)
        made.observe(MODULE, routing, mask)
        spreads.append(float(routing.chosen[mask].float().mean(0).std()))
        made.after_step()
    assert spreads[0] > 0.3
    assert max(spreads[-20:]) < spreads[0] / 3


def test_a_block_is_decided_as_one_and_who_lacks_a_layer_does_nothing_there() -> None:
    members = experts(2, 2, modules=(MODULE, f"{BLOCK}.up_proj"))
    del members[1].modules[f"{BLOCK}.up_proj"]
    made = gate("softmax-top-k", members, per="block")
    allowed = torch.ones(3, 1, 2, dtype=torch.bool)
    site = made.at(MODULE, members)(states(), allowed, None)
    assert (site > 0).all()
    up = made.at(f"{BLOCK}.up_proj", members)(states(), allowed, None)
    assert torch.equal(up, site * torch.tensor([1.0, 0.0]))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax-top-k", {"balance": "localised"}, "needs knowledge-skills"),
        ("softmax-top-k", {"knowledge_skills": ("city",)}, "no meaning with balance none"),
        ("softmax-top-k", {"per": "token"}, "unknown per 'token'"),
        ("top-p", {"p": 1.5}, "the most is 1"),
        ("null-experts", {"nulls": 0}, "the least is 1"),
        ("shared-experts", {}, "has no shared expert"),
        ("shared-experts", {"shared": ("z",)}, "unknown shared expert 'z'"),
        ("shared-experts", {"shared": ("a", "b")}, "nothing to route"),
        ("tree", {"band": 0.0}, "band is 0"),
        ("rank-wise", {"weigh": "relu"}, "unknown weigh"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gate(name, experts(2, 2), **options)


@pytest.mark.parametrize("name", LEARNED)
def test_what_the_router_was_not_trained_for(name: str) -> None:
    members = experts(2, 2, modules=(MODULE, "other.q_proj"))
    made = gate(name, experts(2, 2), **({"shared": ("a",)} if name == "shared-experts" else {}))
    with pytest.raises(BadInput, match=r"was not trained for other\.q_proj"):
        made.at("other.q_proj", members)
    with pytest.raises(BadInput, match="was not trained for expert 'z'"):
        made.at(MODULE, [Expert("z", members[0].modules)])


def test_a_router_of_other_ranks_or_without_numbers() -> None:
    made = gate("rank-wise", experts(2, 2))
    with pytest.raises(BadInput, match="trained for 2 ranks of expert 'a'"):
        made.at(MODULE, experts(3, 2))
    kind = plugins.load("gate", "top-p")
    with pytest.raises(BadInput, match="NaN or infinite"):
        kind(kind.Options(), tensors={"m.router": torch.tensor([[float("nan")]])}, experts=["a"])
