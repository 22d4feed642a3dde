"""How a batch of rows with different weighted experts is computed: a partition of the rows into segments.

A row's update is y += sum_e w_e B_e A_e x. A segment holds neighbouring rows and the experts they use, whose A and B
are concatenated (identity I6 of the SMoRA form: a weighted sum of LoRAs is one LoRA with a diagonal weight):

    h = x A_all^T ;  h *= weights ;  y += h B_all^T

One segment per expert set is "sorted and sliced"; one segment over all rows is "concatenated with a weight mask". What
lies between is allowed too: `make_plan` finds the cheapest partition of the sorted rows by dynamic programming over
`CostModel`. Rows must come sorted by `row_order`, so that equal expert sets are neighbours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xpert.experts.adapters import Adapter

if TYPE_CHECKING:
    import torch

__all__ = ["COSTS", "CostModel", "Plan", "Planner", "RowExperts", "Segment", "row_order"]

RowExperts = tuple[tuple[Adapter, float], ...]
"""The adapters of one row with their weights, sorted by key; empty for the base model alone."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of one module's update: `launch` for each segment, and `flop` for each multiply-add on real rows.

    Constants, not a measurement at start-up: the plan, and with it the last bits of the logits, must not depend on how
    busy the machine is. They are fitted by `benchmarks/engine.py --fit`.
    """

    launch: float
    flop: float


# The CUDA pair is an estimate until `--fit` has run there; it changes speed alone.
COSTS = {"cpu": CostModel(launch=13e-6, flop=3e-11), "cuda": CostModel(launch=20e-6, flop=2e-14)}


def row_order(experts: RowExperts) -> tuple[tuple[str, str], ...]:
    """Sort key that brings rows with the same set of experts together; rows of the base model come first."""
    return tuple((adapter.key, adapter.fingerprint) for adapter, _ in experts)


@dataclass(frozen=True)
class Stack:
    """The concatenated matrices of one module. a [R, in], b [out, R]; `layout` says which adapter owns which ranks."""

    a: torch.Tensor
    b: torch.Tensor
    layout: tuple[tuple[int, int], ...]  # (index into the segment's adapters, rank)


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows start..stop of the batch, computed together.

    modules: module name -> (a [R, in], b [out, R], weights [rows, 1, R] or None where all weights are one).
    """

    start: int
    stop: int
    modules: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one forward pass adds to which of its `rows`. `modules` maps a module's name to its segments."""

    rows: int
    segments: tuple[Segment, ...]
    modules: dict[str, list[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor | None]]] = field(init=False)

    def __post_init__(self) -> None:
        modules: dict[str, list[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {}
        for segment in self.segments:
            for name, parts in segment.modules.items():
                modules.setdefault(name, []).append((segment.start, segment.stop, *parts))
        object.__setattr__(self, "modules", modules)


class Planner:
    """Makes plans, and keeps the concatenations of the latest expert sets for the next ones.

    `keep` bounds how many concatenations of several adapters are held; each costs as much memory as its adapters.
    """

    def __init__(self, costs: CostModel, *, keep: int = 16) -> None:
        self.costs = costs
        self._keep = keep
        self._stacks: OrderedDict[tuple[tuple[str, str], ...], tuple[tuple[Adapter, ...], dict[str, Stack]]]
        self._stacks = OrderedDict()
        self._lock = threading.Lock()  # sessions in several threads share a planner

    def make_plan(self, rows: Sequence[RowExperts], tokens: int) -> Plan:
        """The cheapest plan for `rows`, sorted by `row_order`, of `tokens` tokens each.

        Time O(s^2) for s runs of equal expert sets, which is at most the number of rows.
        """
        runs = _runs(rows)
        segments = []
        for first, last in self._partition(rows, runs, tokens):
            start, stop = runs[first][0], runs[last - 1][1]
            adapters = _union(rows[start:stop])
            if adapters:
                segments.append(self._segment(rows, start, stop, adapters))
        return Plan(len(rows), tuple(segments))

    def forget(self, adapter: Adapter) -> None:
        """Drops the concatenations that an adapter is part of."""
        with self._lock:
            for key in [key for key, (adapters, _) in self._stacks.items() if adapter in adapters]:
                del self._stacks[key]

    def _partition(self, rows: Sequence[RowExperts], runs: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
        """The cut of the runs into neighbouring groups of least total cost: best[j] = min_i best[i] + cost(i..j)."""
        best = [0.0] + [float("inf")] * len(runs)
        cut = [0] * (len(runs) + 1)
        for i in range(len(runs)):
            found: dict[Adapter, None] = {}
            load = modules = 0
            for j in range(i + 1, len(runs) + 1):
                for adapter, _ in rows[runs[j - 1][0]]:
                    if adapter not in found:
                        found[adapter] = None
                        load += sum(part.a.numel() + part.b.numel() for part in adapter.modules.values())
                        modules = max(modules, len(adapter.modules))
                count = (runs[j - 1][1] - runs[i][0]) * tokens
                cost = best[i] + modules * self.costs.launch + self.costs.flop * count * load
                if cost < best[j]:
                    best[j], cut[j] = cost, i
        groups, j = [], len(runs)
        while j:
            groups.append((cut[j], j))
            j = cut[j]
        return groups[::-1]

    def _segment(self, rows: Sequence[RowExperts], start: int, stop: int, adapters: tuple[Adapter, ...]) -> Segment:
        import torch

        place = {adapter: index for index, adapter in enumerate(adapters)}
        table = torch.zeros(stop - start, len(adapters))
        for index, row in enumerate(rows[start:stop]):
            for adapter, weight in row:
                table[index, place[adapter]] = weight
        plain = bool((table == 1).all())
        widened: dict[tuple[tuple[int, int], ...], torch.Tensor | None] = {}
        modules = {}
        for name, stack in self._stack(adapters).items():
            if stack.layout not in widened:
                owners, ranks = (torch.tensor(column) for column in zip(*stack.layout, strict=True))
                weights = table[:, owners.repeat_interleave(ranks)].to(stack.a.device, stack.a.dtype)
                widened[stack.layout] = None if plain else weights[:, None, :]
            modules[name] = (stack.a, stack.b, widened[stack.layout])
        return Segment(start, stop, modules)

    def _stack(self, adapters: tuple[Adapter, ...]) -> dict[str, Stack]:
        if len(adapters) == 1:
            parts = adapters[0].modules.items()
            return {name: Stack(part.a, part.b, ((0, part.rank),)) for name, part in parts}
        key = tuple((adapter.key, adapter.fingerprint) for adapter in adapters)
        with self._lock:
            if key not in self._stacks:
                self._stacks[key] = (adapters, _concatenated(adapters))
                while len(self._stacks) > self._keep:
                    self._stacks.popitem(last=False)
            self._stacks.move_to_end(key)
            return self._stacks[key][1]


def _concatenated(adapters: tuple[Adapter, ...]) -> dict[str, Stack]:
    import torch

    stacks = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        held = [(i, adapter.modules[name]) for i, adapter in enumerate(adapters) if name in adapter.modules]
        stacks[name] = Stack(
            torch.cat([part.a for _, part in held]),
            torch.cat([part.b for _, part in held], dim=1),
            tuple((i, part.rank) for i, part in held),
        )
    return stacks


def _runs(rows: Sequence[RowExperts]) -> list[tuple[int, int]]:
    """Start and stop of each stretch of rows with the same set of experts (the weights may differ)."""
    runs: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if index and row_order(row) == row_order(rows[index - 1]):
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _union(rows: Sequence[RowExperts]) -> tuple[Adapter, ...]:
    found = {adapter: None for row in rows for adapter, _ in row}
    return tuple(sorted(found, key=lambda adapter: (adapter.key, adapter.fingerprint)))
