"""How a batch of rows with different weighted experts is computed: a partition of the rows into segments.

A row's update is y += sum_e w_e B_e A_e x. A segment holds neighbouring rows and the experts they use, whose A and B
are concatenated (identity I6 of the SMoRA form: a weighted sum of LoRAs is one LoRA with a diagonal weight):

    h = x A_all^T ;  h *= weights ;  y += h B_all^T

The weights are each row's own, or, behind a token gate, each token's. One segment per expert set is "sorted and
sliced"; one segment over all rows is "concatenated with a weight mask". What lies between is allowed too: `make_plan`
finds the cheapest partition of the sorted rows by dynamic programming over `CostModel`. Rows must come sorted by
`row_order`, so that equal gates and expert sets are neighbours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from xpert.experts.adapters import Adapter
from xpert.protocols import Gate, ModuleGate

if TYPE_CHECKING:
    import torch

__all__ = ["COSTS", "CostModel", "GateEntry", "Gating", "Part", "Plan", "Planner", "RowMixture", "row_order"]


@dataclass(frozen=True, eq=False)
class GateEntry:
    """A gate as the engine knows it. `number` tells it from earlier ones under the same key."""

    key: str
    number: int
    gate: Gate


@dataclass(frozen=True)
class RowMixture:
    """What one row is computed with: adapters and weights sorted by key, and the gate that weighs them, if any.

    No experts: the base model alone. `bias` follows the experts, and is empty or added to the gate's logits.
    """

    experts: tuple[tuple[Adapter, float], ...] = ()
    gate: GateEntry | None = None
    bias: tuple[float, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides the row's keys and values: the experts' content, weights, gate and bias.

        Names only behind a gate, which may have learned experts by them.
        """
        experts = tuple((a.fingerprint, weight, a.key if self.gate else "") for a, weight in self.experts)
        return (self.gate.number if self.gate else 0, experts, self.bias)


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

GATE_LAUNCHES = 4
"""A gated module's update calls about so many times the tensor operations of a plain one."""

_Key = tuple[tuple[str, str], ...]


def row_order(row: RowMixture) -> tuple[int, _Key]:
    """Sort key that brings rows with the same gate and experts together; rows of the base model come first."""
    return (row.gate.number if row.gate else 0, _key(adapter for adapter, _ in row.experts))


@dataclass(frozen=True)
class Stack:
    """The concatenated matrices of one module. a [R, in], b [out, R]; `layout` says which adapter owns which ranks."""

    a: torch.Tensor
    b: torch.Tensor
    layout: tuple[tuple[int, int], ...]  # (index into the segment's adapters, rank)


@dataclass(frozen=True, eq=False)
class Gating:
    """How a segment's gate weighs the ranks of one module.

    allowed [rows, 1, e] bool, bias [rows, 1, e] or None; strengths [rows, 1, R] or None where all are one; owners [R]
    names the expert of each rank, None where the gate speaks of ranks itself; even: the rank that all e experts have,
    0 where they differ. `gate` decides at module `site`, for others too where `shared`.
    """

    site: str
    gate: ModuleGate
    allowed: torch.Tensor
    bias: torch.Tensor | None
    strengths: torch.Tensor | None
    owners: torch.Tensor | None
    even: int
    shared: bool


@dataclass(frozen=True, eq=False)
class Part:
    """One module's update of rows start..stop: a [R, in], b [out, R], weights [rows, 1, R] or None where all are one.

    With `gating`, its weights stand in their place. Without matrices the module only decides for others. off bool
    [rows, 1, R]: the ranks of experts that are others' (None: there are none). Their products are dropped rather than
    weighed with zero, since zero times infinity is no number.
    """

    start: int
    stop: int
    matrices: tuple[torch.Tensor, torch.Tensor] | None
    weights: torch.Tensor | None = None
    gating: Gating | None = None
    off: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What one forward pass adds to which of its `rows`: module name -> the parts of its segments."""

    rows: int
    modules: dict[str, list[Part]] = field(default_factory=dict)


class Planner:
    """Makes plans, and keeps the concatenations and gates of the latest expert sets for the next ones.

    `keep` bounds how many concatenations of several adapters are held, and `keep_bytes` what they take together (the
    latest aside); each costs as much memory as its adapters.
    """

    def __init__(self, costs: CostModel, *, keep: int = 16, keep_bytes: int | None = None) -> None:
        self.costs = costs
        self._stacks: _Recent[dict[str, Stack]] = _Recent(keep, keep_bytes)
        self._gates: _Recent[dict[str, ModuleGate]] = _Recent(4 * keep)

    def make_plan(self, rows: Sequence[RowMixture], tokens: int) -> Plan:
        """The cheapest plan for `rows`, sorted by `row_order`, of `tokens` tokens each.

        Time O(s^2) for s runs of equal expert sets, which is at most the number of rows. Raises BadInput where a gate
        lacks what it needs of an expert.
        """
        runs = _runs(rows)
        plan = Plan(len(rows))
        for first, last in self._partition(rows, runs, tokens):
            start, stop = runs[first][0], runs[last - 1][1]
            adapters = _union(rows[start:stop])
            if adapters:
                for name, part in self._segment(rows, start, stop, adapters):
                    plan.modules.setdefault(name, []).append(part)
        return plan

    def check(self, row: RowMixture) -> None:
        """Raises BadInput where the row's gate lacks what it needs of an expert; cheap when asked again."""
        if row.gate is not None:
            adapters = _union([row])
            for name in self._stack(adapters):
                self._module_gate(row.gate, row.gate.gate.site(name), adapters)

    def forget(self, adapter: Adapter) -> None:
        """Drops the concatenations and gates that an adapter is part of."""
        self._stacks.forget(adapter)
        self._gates.forget(adapter)

    def _partition(self, rows: Sequence[RowMixture], runs: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
        """The cut of the runs into neighbouring groups of least total cost: best[j] = min_i best[i] + cost(i..j)."""
        best = [0.0] + [float("inf")] * len(runs)
        cut = [0] * (len(runs) + 1)
        for i in range(len(runs)):
            found: dict[Adapter, None] = {}
            load = modules = 0
            gate = rows[runs[i][0]].gate
            for j in range(i + 1, len(runs) + 1):
                row = rows[runs[j - 1][0]]
                if row.gate is not gate:
                    break
                for adapter, _ in row.experts:
                    if adapter not in found:
                        found[adapter] = None
                        load += sum(part.a.numel() + part.b.numel() for part in adapter.modules.values())
                        modules = max(modules, len(adapter.modules))
                count = (runs[j - 1][1] - runs[i][0]) * tokens
                launches = modules * (GATE_LAUNCHES if gate else 1)
                cost = best[i] + launches * self.costs.launch + self.costs.flop * count * load
                if cost < best[j]:
                    best[j], cut[j] = cost, i
        groups, j = [], len(runs)
        while j:
            groups.append((cut[j], j))
            j = cut[j]
        return groups[::-1]

    def _segment(
        self, rows: Sequence[RowMixture], start: int, stop: int, adapters: tuple[Adapter, ...]
    ) -> list[tuple[str, Part]]:
        """(module, part) of the segment, in no order that matters."""
        import torch

        place = {adapter: index for index, adapter in enumerate(adapters)}
        table = torch.zeros(stop - start, len(adapters))
        for index, row in enumerate(rows[start:stop]):
            for adapter, weight in row.experts:
                table[index, place[adapter]] = weight
        stacks = self._stack(adapters)
        entry = rows[start].gate
        if entry is not None:
            return self._gated(entry, rows[start:stop], (start, stop), adapters, stacks, table)
        plain, shared = bool((table == 1).all()), bool((table == 0).any())
        widened: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        masks: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        parts = []
        for name, stack in stacks.items():
            if not plain and stack.layout not in widened:
                widened[stack.layout] = weights = _widened(table, stack)
                if shared:
                    masks[stack.layout] = weights == 0
            weighed, off = widened.get(stack.layout), masks.get(stack.layout)
            parts.append((name, Part(start, stop, (stack.a, stack.b), weighed, off=off)))
        return parts

    def _gated(
        self,
        entry: GateEntry,
        rows: Sequence[RowMixture],
        span: tuple[int, int],
        adapters: tuple[Adapter, ...],
        stacks: dict[str, Stack],
        table: torch.Tensor,
    ) -> list[tuple[str, Part]]:
        device = next(iter(stacks.values())).a.device
        allowed = (table != 0)[:, None].to(device)
        bias = _biases(rows, adapters, device)
        plain = bool(((table == 0) | (table == 1)).all())
        sites = {name: entry.gate.site(name) for name in stacks}
        deciders = {site for name, site in sites.items() if site != name}

        def gating(name: str, stack: Stack | None) -> Gating:
            site = sites.get(name, name)
            owners, even, strengths = None, 0, None
            if stack is not None:
                if entry.gate.grain == "expert":
                    owners, even = _owners(stack).to(device), _even(stack, len(adapters))
                strengths = None if plain else _widened(table, stack)
            decides = self._module_gate(entry, site, adapters)
            return Gating(site, decides, allowed, bias, strengths, owners, even, name in deciders)

        shared = bool((table == 0).any())
        parts = []
        for name, stack in stacks.items():
            off = _widened(table, stack) == 0 if shared else None
            parts.append((name, Part(*span, (stack.a, stack.b), gating=gating(name, stack), off=off)))
        only = [(name, Part(*span, None, gating=gating(name, None))) for name in sorted(deciders - set(stacks))]
        return parts + only

    def _stack(self, adapters: tuple[Adapter, ...]) -> dict[str, Stack]:
        if len(adapters) == 1:
            parts = adapters[0].modules.items()
            return {name: Stack(part.a, part.b, ((0, part.rank),)) for name, part in parts}
        return self._stacks.made(_key(adapters), adapters, lambda: _concatenated(adapters))

    def _module_gate(self, entry: GateEntry, site: str, adapters: tuple[Adapter, ...]) -> ModuleGate:
        gates = self._gates.made((entry.number, _key(adapters)), adapters, dict)
        if site not in gates:
            gates[site] = entry.gate.at(site, adapters)
        return gates[site]


Value = TypeVar("Value")


class _Recent(OrderedDict[object, tuple[tuple[Adapter, ...], Value]]):
    """The values used last, each with the adapters it is made of. Sessions in several threads share them.

    `keep_bytes` counts a value as its adapters' bytes; the latest stays whatever its size.
    """

    def __init__(self, keep: int, keep_bytes: int | None = None) -> None:
        super().__init__()
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._bytes = 0
        self._lock = threading.RLock()

    def made(self, key: object, adapters: tuple[Adapter, ...], make: Callable[[], Value]) -> Value:
        with self._lock:
            if key not in self:
                self[key] = (adapters, make())
                self._bytes += _bytes(adapters)
                while len(self) > self._keep or (
                    self._keep_bytes is not None and self._bytes > self._keep_bytes and len(self) > 1
                ):
                    self._bytes -= _bytes(self.popitem(last=False)[1][0])
            self.move_to_end(key)
            return self[key][1]

    def forget(self, adapter: Adapter) -> None:
        with self._lock:
            for key in [key for key, (adapters, _) in self.items() if adapter in adapters]:
                self._bytes -= _bytes(self.pop(key)[0])


def _bytes(adapters: Iterable[Adapter]) -> int:
    return sum(adapter.bytes for adapter in adapters)


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


def _owners(stack: Stack) -> torch.Tensor:
    """[R] int64: the adapter each rank belongs to."""
    import torch

    owners, ranks = (torch.tensor(column) for column in zip(*stack.layout, strict=True))
    return owners.repeat_interleave(ranks)


def _even(stack: Stack, experts: int) -> int:
    """The rank of every one of the experts where all have this module with the same one, else 0."""
    ranks = {rank for _, rank in stack.layout}
    return ranks.pop() if len(stack.layout) == experts and len(ranks) == 1 else 0


def _widened(table: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The rows' weights per adapter [rows, e] as weights per rank [rows, 1, R]."""
    return table[:, _owners(stack)].to(stack.a.device, stack.a.dtype)[:, None, :]


def _biases(rows: Sequence[RowMixture], adapters: tuple[Adapter, ...], device: torch.device) -> torch.Tensor | None:
    import torch

    if not any(row.bias for row in rows):
        return None
    place = {adapter: index for index, adapter in enumerate(adapters)}
    table = torch.zeros(len(rows), 1, len(adapters))
    for index, row in enumerate(rows):
        for (adapter, _), bias in zip(row.experts, row.bias, strict=bool(row.bias)):
            table[index, 0, place[adapter]] = bias
    return table.to(device)


def _key(adapters: Iterable[Adapter]) -> _Key:
    return tuple((adapter.key, adapter.fingerprint) for adapter in adapters)


def _runs(rows: Sequence[RowMixture]) -> list[tuple[int, int]]:
    """Start and stop of each stretch of rows with the same gate and set of experts (the weights may differ)."""
    runs: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if index and row_order(row) == row_order(rows[index - 1]):
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _union(rows: Sequence[RowMixture]) -> tuple[Adapter, ...]:
    found = {adapter: None for row in rows for adapter, _ in row.experts}
    return tuple(sorted(found, key=lambda adapter: (adapter.key, adapter.fingerprint)))
