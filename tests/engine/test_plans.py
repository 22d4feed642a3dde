"""The plan of a batch: the cheapest partition of its rows, and every row in the right segment."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.experts.adapters import Adapter, LowRank
from xpert.experts.engines._lora_plan import CostModel, Planner, RowMixture, _runs, _union, row_order


def make_bank() -> dict[str, Adapter]:
    """Adapters of unequal ranks on one or two modules; each matrix holds the adapter's number."""
    import torch

    def part(value: float, rank: int) -> LowRank:
        return LowRank(torch.full((rank, 3), value), torch.full((5, rank), value))

    bank = {}
    for number, (key, ranks) in enumerate({"a": (1,), "b": (4, 2), "c": (2,), "d": (3, 3)}.items(), start=1):
        modules = {f"m{place}": part(float(number), rank) for place, rank in enumerate(ranks)}
        bank[key] = Adapter(key, f"print-{key}", modules)
    return bank


BANK = make_bank()
ROWS = st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0]), max_size=3), max_size=7)


def to_rows(sets: list[dict[str, float]]) -> list[RowMixture]:
    rows = [RowMixture(tuple((BANK[key], weight) for key, weight in sorted(weights.items()))) for weights in sets]
    return sorted(rows, key=row_order)


def cost(costs: CostModel, rows: list[RowMixture], tokens: int) -> float:
    adapters = _union(rows)
    load = sum(p.a.numel() + p.b.numel() for adapter in adapters for p in adapter.modules.values())
    launches = max((len(adapter.modules) for adapter in adapters), default=0)
    return launches * costs.launch + costs.flop * len(rows) * tokens * load


@given(ROWS, st.floats(0, 50), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_partition_is_the_cheapest_of_all(sets: list[dict[str, float]], launch: float, tokens: int) -> None:
    rows, costs = to_rows(sets), CostModel(launch, 1.0)
    runs = _runs(rows)
    assert [index for run in runs for index in range(*run)] == list(range(len(rows)))

    def total(groups: list[tuple[int, int]]) -> float:
        return sum(cost(costs, rows[runs[first][0] : runs[last - 1][1]], tokens) for first, last in groups)

    found = Planner(costs)._partition(rows, runs, tokens)
    assert [run for group in found for run in range(*group)] == list(range(len(runs)))
    every = []
    for chosen in product([False, True], repeat=max(len(runs) - 1, 0)):
        cuts = [0, *(place for place, cut in enumerate(chosen, start=1) if cut), len(runs)]
        every.append(total(list(pairwise(cuts)) if runs else []))
    assert abs(total(found) - min(every)) <= 1e-9 * max(1.0, min(every))


@given(ROWS, st.sampled_from([0.0, 5.0, 1e9]))
@settings(max_examples=60, deadline=None)
def test_segments_give_each_row_its_own_weighted_sum(sets: list[dict[str, float]], launch: float) -> None:
    import torch

    rows = to_rows(sets)
    plan = Planner(CostModel(launch, 1.0)).make_plan(rows, 1)
    for module in ("m0", "m1"):
        found = torch.zeros(len(rows), 5)
        for part in plan.modules.get(module, []):
            assert part.matrices is not None
            h = torch.ones(part.stop - part.start, 1, 3) @ part.matrices[0].T
            weighted = h if part.weights is None else h * part.weights
            found[part.start : part.stop] += (weighted @ part.matrices[1].T)[:, 0]
        for index, row in enumerate(rows):
            held = [(adapter.modules[module], weight) for adapter, weight in row.experts if module in adapter.modules]
            expected = sum(weight * (part.b @ part.a @ torch.ones(3)) for part, weight in held)
            assert torch.allclose(found[index], torch.zeros(5) + expected)


def test_few_concatenations_are_kept_and_forgotten_with_their_adapter() -> None:
    planner = Planner(CostModel(1e9, 0.0), keep=2)
    for first, second in ("ab", "ac", "ad", "bc"):
        planner.make_plan(to_rows([{first: 1.0, second: 1.0}]), 1)
    kept = [[key for key, _ in stack] for stack in planner._stacks]
    assert kept == [["a", "d"], ["b", "c"]]
    planner.forget(BANK["d"])
    assert len(planner._stacks) == 1
