"""What holds for every merger, and the exact forms of each beside plain dense ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.adapters import LowRank
from xpert.experts.low_rank import factorised, inner_products, truncated, weighted_sum
from xpert.experts.mergers import _deltas
from xpert.experts.merging import MergeResult, merge
from xpert.protocols import LowRankUpdate, MergeTask

SHAPES = {"q": (24, 20), "up": (16, 40), "down": (40, 16)}
"""module -> (outputs, inputs)"""
MERGERS = plugins.names("merger")
EXACT = {"concat", "task-arithmetic", "lorahub", "grouped"}
# What makes a merge of one expert of weight 1 that expert; lorahub looks for a weight of its own.
SINGLE: dict[str, dict[str, Any]] = {
    "concat": {},
    "svd": {},
    "task-arithmetic": {},
    "grouped": {},
    "ties": {"density": 1},
    "dare": {"density": 1},
}


def made_expert(seed: int, rank: int, modules: tuple[str, ...] = tuple(SHAPES)) -> dict[str, LowRankUpdate]:
    chance = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, SHAPES[name][1], generator=chance), torch.randn(SHAPES[name][0], rank, generator=chance)
        )
        for name in modules
    }


@pytest.fixture
def task() -> MergeTask:
    """Four experts, of unequal ranks and modules; one has a negative weight where a method takes it."""
    experts = (made_expert(1, 4), made_expert(2, 3), made_expert(3, 6, ("q",)), made_expert(4, 2, ("up", "down")))
    return MergeTask(("one", "two", "three", "four"), experts, (0.4, 0.3, 0.2, 0.1), loss=planted_loss)


def planted_loss(weights: Any) -> float:
    """Least where the experts weigh 0.8, -0.3 and 0 for all others (in the order given)."""
    wanted = [0.8, -0.3, *[0.0] * (len(weights) - 2)][: len(weights)]
    return 1.0 + float(sum((weight - best) ** 2 for weight, best in zip(weights, wanted, strict=True)))


def dense(update: LowRankUpdate | None, like: torch.Tensor | None = None) -> torch.Tensor:
    if update is None:
        assert like is not None
        return torch.zeros_like(like)
    return update.b.double() @ update.a.double()


def dense_sum(task: MergeTask, weights: Sequence[float], members: Sequence[int]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for index, weight in zip(members, weights, strict=True):
        for name, update in task.experts[index].items():
            total[name] = total.get(name, torch.zeros(())) + weight * dense(update)
    return total


def changes(result: MergeResult) -> dict[str, torch.Tensor]:
    return {name: dense(update) for name, update in result.merged.modules.items()}


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], wanted[name], atol=tolerance, rtol=1e-4) for name in wanted
    )


def reordered(task: MergeTask, order: Sequence[int]) -> MergeTask:
    loss = task.loss
    assert loss is not None
    back = [list(order).index(index) for index in range(len(order))]
    return dataclasses.replace(
        task,
        keys=tuple(task.keys[i] for i in order),
        experts=tuple(task.experts[i] for i in order),
        weights=tuple(task.weights[i] for i in order),
        loss=lambda weights: loss([weights[place] for place in back]),
    )


@pytest.mark.parametrize("method", MERGERS)
def test_the_error_told_is_that_of_dense_matrices(method: str, task: MergeTask) -> None:
    for result in merge(task, method):
        exact = dense_sum(task, result.merged.weights, result.merged.members)
        found = changes(result)
        apart = {name: (found[name] - exact[name]).norm().item() for name in exact}
        for name, module in result.error.modules.items():
            assert module.relative == pytest.approx(apart[name] / exact[name].norm().item(), rel=1e-6, abs=1e-9)
        norm = math.hypot(*(value.norm().item() for value in exact.values()))
        assert result.error.total == pytest.approx(math.hypot(*apart.values()) / norm, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", sorted(EXACT))
def test_exact_methods_have_no_error(method: str, task: MergeTask) -> None:
    assert all(result.error.total is not None and result.error.total < 1e-6 for result in merge(task, method))


@pytest.mark.parametrize("method", MERGERS)
def test_the_order_of_experts_changes_nothing(method: str, task: MergeTask) -> None:
    def by_members(results: list[MergeResult]) -> dict[frozenset[str], MergeResult]:
        return {frozenset(result.keys): result for result in results}

    one, other = by_members(merge(task, method)), by_members(merge(reordered(task, [2, 0, 3, 1]), method))
    assert one.keys() == other.keys()
    for members, result in one.items():
        assert result.weights() == other[members].weights()
        for name, update in result.merged.modules.items():
            assert torch.equal(update.a, other[members].merged.modules[name].a)
            assert torch.equal(update.b, other[members].merged.modules[name].b)


@pytest.mark.parametrize("method", sorted(set(MERGERS) - {"lorahub"}))
def test_an_expert_of_weight_zero_changes_nothing(method: str, task: MergeTask) -> None:
    more = dataclasses.replace(
        task,
        keys=(*task.keys, "none"),
        experts=(*task.experts, made_expert(9, 12)),
        weights=(*task.weights, 0.0),
    )
    for one, other in zip(merge(task, method), merge(more, method), strict=True):
        assert same(changes(one), changes(other), 0)
        assert one.rank == other.rank


@pytest.mark.parametrize("method", SINGLE)
def test_one_expert_of_weight_one_stays_as_it_is(method: str) -> None:
    expert = made_expert(5, 4)
    (result,) = merge(MergeTask(("one",), (expert,), (1.0,)), method, SINGLE[method])
    assert same(changes(result), {name: dense(update) for name, update in expert.items()})
    assert result.error.total is not None and result.error.total < 1e-5
    assert method in ("grouped",) or {u.rank for u in result.merged.modules.values()} == {4}


@pytest.mark.parametrize("method", MERGERS)
def test_the_rank_asked_for_is_kept(method: str, task: MergeTask) -> None:
    if method == "concat":
        with pytest.raises(BadInput, match="concat keeps every rank and cannot hold 3"):
            merge(dataclasses.replace(task, rank=3), method)
        return
    for result in merge(dataclasses.replace(task, rank=3), method):
        assert all(update.rank <= 3 for update in result.merged.modules.values())


@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": (0.1, float("nan"), 0.1, 0.1)}, "the weight of expert 'two' is nan"),
        ({"weights": (0.1, float("inf"), 0.1, 0.1)}, "the weight of expert 'two' is inf"),
        ({"weights": (0.0, 0.0, 0.0, 0.0)}, "all weights are zero"),
        ({"weights": (1.0,)}, "1 weights for 4 experts"),
        ({"rank": 0}, "rank is 0; the least is 1"),
        ({"keys": ("one", "one", "three", "four")}, "two experts are called 'one'"),
    ],
)
def test_bad_tasks_are_refused(method: str, changed: dict[str, Any], message: str, task: MergeTask) -> None:
    with pytest.raises(BadInput, match=message):
        merge(dataclasses.replace(task, **changed), method)


def test_experts_of_different_shapes_are_refused(task: MergeTask) -> None:
    odd = {"q": LowRank(torch.ones(2, 21), torch.ones(24, 2))}
    with pytest.raises(
        BadInput, match="different bases cannot be merged: q maps 20 to 24 in 'one', but 21 to 24 in 'x'"
    ):
        merge(MergeTask(("one", "x"), (task.experts[0], odd), (1.0, 1.0)), "concat")


def test_numbers_too_large_are_refused(task: MergeTask) -> None:
    with pytest.raises(BadInput, match="too large for float32"):
        merge(dataclasses.replace(task, weights=(1e300, 1.0, 1.0, 1.0)), "concat")


@settings(max_examples=30, deadline=None)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_svd_is_as_near_as_the_dense_svd(ranks: list[int], rank: int, seed: int) -> None:
    experts = tuple(made_expert(seed + index, r, ("q",)) for index, r in enumerate(ranks))
    weights = tuple(np.random.default_rng(seed).normal(size=len(ranks)).tolist())
    task = MergeTask(tuple(f"e{i}" for i in range(len(ranks))), experts, weights, rank=rank)
    (result,) = merge(task, "svd")
    values = torch.linalg.svdvals(dense_sum(task, weights, range(len(ranks)))["q"])
    wanted = (values[rank:].norm() / values.norm()).item()
    assert result.error.total == pytest.approx(wanted, abs=1e-6)
    assert result.merged.log["truncation"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_a_dense_change_is_factorised_as_its_svd_does(shape: tuple[int, int]) -> None:
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in (1, 3, 7, 50):
        update, lost = factorised(delta, rank)
        wanted = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert torch.allclose(dense(update), wanted, atol=1e-5)
        assert lost == pytest.approx(values[rank:].norm().item(), abs=1e-6)


def test_a_change_of_zero_is_factorised() -> None:
    update, lost = factorised(torch.zeros(3, 5), 2)
    assert lost == 0 and not dense(update).any()


def test_what_a_cut_loses_is_told() -> None:
    whole = weighted_sum([made_expert(1, 6)], [2.0])["up"]
    part, lost = truncated(whole, 4)
    assert lost == pytest.approx((dense(whole) - dense(part)).norm().item(), rel=1e-5)


def test_inner_products_are_those_of_dense_changes(task: MergeTask) -> None:
    found = inner_products(task.experts)
    for i, one in enumerate(task.experts):
        for j, other in enumerate(task.experts):
            wanted = sum((dense(one[name]) * dense(other[name])).sum().item() for name in one if name in other)
            assert found[i, j].item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def dense_ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Entry by entry, from the paper."""
    trimmed = []
    for delta in deltas:
        flat = delta.flatten()
        kept = sorted(range(len(flat)), key=lambda i: (-abs(flat[i].item()), i))[: int(density * len(flat))]
        own = torch.zeros_like(flat)
        own[kept] = flat[kept]
        trimmed.append(own)
    out = []
    for entry in range(trimmed[0].numel()):
        values = [w * t[entry].item() for w, t in zip(weights, trimmed, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [(abs(w), v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        size = sum(w for w, _ in agreeing)
        out.append(sum(map(abs, weights)) * sum(v for _, v in agreeing) / size if agreeing else 0.0)
    return torch.tensor(out).view(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_ties_is_the_plain_form(density: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_deltas, "BLOCK", block)
    experts = tuple(made_expert(seed, rank, ("q",)) for seed, rank in ((1, 4), (2, 3), (3, 6)))
    weights = (0.5, 0.3, -0.2)
    task = MergeTask(("e1", "e2", "e3"), experts, weights, rank=20)
    (result,) = merge(task, "ties", {"density": density})
    deltas = [expert["q"].b @ expert["q"].a for expert in experts]
    assert torch.allclose(changes(result)["q"].float(), dense_ties(deltas, weights, density), atol=1e-4)
    assert result.merged.log["truncation"] < 1e-6


def test_ties_of_equal_changes_keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_deltas, "BLOCK", 4)
    expert = {"q": LowRank(torch.ones(1, 4), torch.ones(3, 1))}
    (result,) = merge(MergeTask(("one",), (expert,), (1.0,), rank=3), "ties", {"density": 0.5})
    wanted = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).double()
    assert torch.allclose(changes(result)["q"], wanted, atol=1e-6)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_is_the_plain_form(elect: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpert.experts.mergers.dare import _seed

    monkeypatch.setattr(_deltas, "BLOCK", 50)
    experts = tuple(made_expert(seed, rank, ("q",)) for seed, rank in ((1, 4), (2, 3)))
    task = MergeTask(("e1", "e2"), experts, (0.6, 0.4), rank=20, seed=7)
    (result,) = merge(task, "dare", {"density": 0.5, "elect": elect})
    dropped = []
    for key, expert in zip(task.keys, experts, strict=True):
        chance = np.random.default_rng(_seed(7, key, "q")).random((24, 20), dtype=np.float32)
        dropped.append((expert["q"].b @ expert["q"].a) * torch.from_numpy(chance < 0.5) / 0.5)
    wanted = dense_ties(dropped, task.weights, 1.0) if elect else 0.6 * dropped[0] + 0.4 * dropped[1]
    assert torch.allclose(changes(result)["q"].float(), wanted, atol=1e-4)


def test_dare_follows_its_seed(task: MergeTask) -> None:
    one, again, other = (merge(dataclasses.replace(task, seed=seed), "dare")[0] for seed in (1, 1, 2))
    assert same(changes(one), changes(again), 0)
    assert not same(changes(one), changes(other))


def test_dare_is_the_weighted_sum_in_the_mean(task: MergeTask) -> None:
    runs = [merge(dataclasses.replace(task, seed=seed, rank=40), "dare")[0] for seed in range(60)]
    exact = dense_sum(task, task.weights, range(4))["q"]
    mean = torch.stack([changes(run)["q"] for run in runs]).mean(0)
    apart, alone = (mean - exact).norm() / exact.norm(), runs[0].error.modules["q"].relative
    assert alone is not None and apart < alone / 5


def test_task_arithmetic_scales_and_subtracts(task: MergeTask) -> None:
    (result,) = merge(dataclasses.replace(task, weights=(1.0, -1.0, 0.5, 0.0)), "task-arithmetic", {"scaling": 0.5})
    assert same(changes(result), dense_sum(task, (0.5, -0.5, 0.25, 0.0), range(4)))


def test_lorahub_finds_planted_weights(task: MergeTask) -> None:
    (result,) = merge(task, "lorahub", {"penalty": 0})
    assert list(result.weights().values()) != list(task.weights)
    found = [result.weights()[key] for key in task.keys]
    assert planted_loss(found) < planted_loss(task.weights) - 0.2
    assert found == pytest.approx([0.8, -0.3, 0.0, 0.0], abs=0.15)
    assert len(result.merged.log["trials"]) <= 40


def test_lorahub_is_never_worse_than_the_given_weights(task: MergeTask) -> None:
    def jagged(weights: Sequence[float]) -> float:
        return 0.0 if tuple(weights) == task.weights else 5.0 + math.sin(100 * sum(weights))

    (result,) = merge(dataclasses.replace(task, loss=jagged), "lorahub", {"evaluations": 6})
    assert tuple(result.weights()[key] for key in task.keys) == task.weights


def test_lorahub_that_finds_nothing_says_so(task: MergeTask) -> None:
    worse = dataclasses.replace(task, loss=lambda weights: sum(map(abs, weights)))
    with pytest.raises(BadInput, match="does better on the shots than the base model alone"):
        merge(worse, "lorahub")
    with pytest.raises(BadInput, match="Give --shots FILE"):
        merge(dataclasses.replace(task, loss=None), "lorahub")


def planted_pool() -> MergeTask:
    """Two families of three alike experts each, interleaved."""
    heads = [made_expert(1, 3), made_expert(2, 3)]
    experts = []
    for index in range(6):
        noise = made_expert(10 + index, 1)
        experts.append(weighted_sum([heads[index % 2], noise], [1.0, 0.1]))
    return MergeTask(tuple("abcdef"), tuple(experts), (0.1, 0.3, 0.2, 0.1, 0.2, 0.1))


@pytest.mark.parametrize("how", ["dominant", "linkage"])
def test_alike_experts_are_grouped(how: str) -> None:
    task = planted_pool()
    # The leaders by weight are b and c, one of each family.
    found = merge(task, "grouped", {"groups": 2, "how": how})
    assert {result.keys for result in found} == {("a", "c", "e"), ("b", "d", "f")}
    weights = next(result.weights() for result in found if result.keys[0] == "a")
    assert weights == pytest.approx({"a": 0.2, "c": 0.4, "e": 0.4})


def test_groups_by_routing_are_weighed_by_usage() -> None:
    task = planted_pool()
    routing = np.zeros((8, 6))
    routing[:4, :3], routing[4:, 3:] = 1.0, 1.0
    usage = (0.3, 0.1, 0.1, 0.2, 0.3, 0.0)
    found = merge(dataclasses.replace(task, usage=usage, routing=routing), "grouped", {"groups": 2, "by": "routing"})
    assert {result.keys for result in found} == {("a", "b", "c"), ("d", "e")}  # f is never used
    assert found[0].weights() == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"groups": 7}, "groups is 7, but 6 experts are in use"),
        ({"by": "routing"}, "by=routing needs to know how prompts were routed"),
        ({"groups": 0}, "groups is 0; the least is 1"),
        ({"by": "deltas"}, "did you mean 'delta'"),
    ],
)
def test_grouping_that_cannot_be(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        merge(planted_pool(), "grouped", params)
    assert message.lower() in str(error.value).lower()


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("ties", {"density": 0}, "density is 0"),
        ("ties", {"density": float("nan")}, "density is nan"),
        ("dare", {"density": 1.5}, "the most is 1"),
        ("task-arithmetic", {"scaling": 0}, "scaling is 0"),
        ("lorahub", {"bound": -1}, "bound is -1"),
        ("svd", {"rnak": 3}, "unknown parameter 'rnak'"),
        ("svdd", {}, "Did you mean 'svd'?"),
    ],
)
def test_bad_parameters_are_refused(method: str, params: dict[str, Any], message: str, task: MergeTask) -> None:
    with pytest.raises(BadInput) as error:
        merge(task, method, params)
    assert message in str(error.value)
