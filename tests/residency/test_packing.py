"""Packing into int8 and int4: round trips, the error's formula, what auto chooses, and what the logits see of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts.adapters import Adapter, LowRank
from xpert.experts.engines._bank import AdapterBank, ResidencyOptions
from xpert.experts.engines._packing import (
    GROUP,
    PackedLowRank,
    adapter_error,
    choose_storage,
    pack_adapter,
    pack_matrix,
    update_error,
)

CPU = torch.device("cpu")


def low_rank(seed: int, rank: int, inputs: int = 70, outputs: int = 45) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 100), st.sampled_from([4, 8]), st.integers(-20, 20), st.integers(0, 10**6))
def test_a_round_trip_is_off_by_half_a_step_at_most_and_exact_on_the_grid(
    rows: int, columns: int, bits: int, exponent: int, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    packed = pack_matrix(matrix, bits)
    back = packed.unpack(CPU, torch.float32)
    padded = -(-columns // GROUP) * GROUP
    assert packed.nbytes == rows * (padded * bits // 8 + 2 * padded // GROUP)
    steps = packed.scales.float().repeat_interleave(GROUP, dim=1)[:, :columns]
    largest = steps * (127 if bits == 8 else 7)
    inside = matrix.abs() <= largest
    assert ((back - matrix).abs() <= steps * 0.5001)[inside].all()
    assert torch.equal(back[~inside], (largest * matrix.sign())[~inside])  # what is clipped is the range's end
    assert torch.equal(pack_matrix(-matrix, bits).unpack(CPU, torch.float32), -back)  # symmetric
    again = pack_matrix(back, 8).unpack(CPU, torch.float32)
    assert torch.allclose(again, back, rtol=0.01, atol=float(largest.max()) / 120)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_codes_survive(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    codes = torch.arange(-most, most + 1).float()
    # Each group holds its largest code, so its scale is the exact power of two.
    matrix = torch.cat([torch.tensor([float(most)]).repeat(len(codes), 1), codes[:, None]], dim=1) * 0.25
    assert torch.equal(pack_matrix(matrix, bits).unpack(CPU, torch.float32), matrix)
    assert torch.equal(pack_matrix(torch.zeros(2, 3), bits).unpack(CPU, torch.float32), torch.zeros(2, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([4, 8, None]), st.integers(0, 10**6))
def test_the_error_by_traces_is_the_dense_one(rank: int, bits: int | None, seed: int) -> None:
    module = low_rank(seed, rank)
    if bits is None:  # anything but a close copy
        served = low_rank(seed + 1, rank)
    else:
        packed = PackedLowRank(pack_matrix(module.a, bits), pack_matrix(module.b.T, bits))
        served = packed.unpack(CPU, torch.float32)
    exact = module.b.double() @ module.a.double()
    dense = float((exact - served.b.double() @ served.a.double()).norm() / exact.norm())
    assert update_error(module, served) == pytest.approx(dense, rel=1e-9)


def test_errors_at_the_ends() -> None:
    module, zero = low_rank(1, 3), LowRank(torch.ones(3, 70), torch.zeros(45, 3))
    assert update_error(module, module) == 0.0
    assert update_error(zero, zero) == 0.0
    assert update_error(zero, module) == math.inf
    assert update_error(module, zero) == pytest.approx(1.0)
    tiny = LowRank(module.a, module.b * (1 + 1e-7))  # differences come before squares: nothing cancels
    assert update_error(module, tiny) == pytest.approx(1e-7, rel=0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_fewer_bits_err_more_and_auto_takes_the_fewest_within_the_tolerance(rank: int, seed: int) -> None:
    adapter = Adapter("x", "f", {"one": low_rank(seed, rank), "two": low_rank(seed + 1, rank)})
    errors = {kind: adapter_error(adapter, pack_adapter(adapter, kind)) for kind in ("native", "int8", "int4")}
    assert errors["native"] == 0.0 < errors["int8"] < errors["int4"]
    sizes = [pack_adapter(adapter, kind).nbytes for kind in ("int4", "int8", "native")]
    assert sizes == sorted(sizes)
    for kind, error in errors.items():
        for tolerance in (error, error * 1.01):
            packed, storage = choose_storage(adapter, "auto", tolerance)
            assert (storage.kind, storage.error) == (kind, error) and storage.host_bytes == packed.nbytes
    assert choose_storage(adapter, "auto", errors["int4"] * 0.99)[1].kind == "int8"
    assert choose_storage(adapter, "auto", errors["int8"] * 0.99)[1].kind == "native"


def test_the_error_is_the_worst_module_s() -> None:
    fine = LowRank(torch.ones(1, 64), torch.ones(64, 1))
    adapter = Adapter("x", "f", {"fine": fine, "coarse": low_rank(3, 4)})
    packed = pack_adapter(adapter, "int4").modules["coarse"]
    assert isinstance(packed, PackedLowRank)
    expected = update_error(adapter.modules["coarse"], packed.unpack(CPU, torch.float32))
    assert adapter_error(adapter, pack_adapter(adapter, "int4")) == expected > 0.05


def test_bfloat16_errors_are_those_of_what_is_served() -> None:
    module = low_rank(5, 4)
    half = LowRank(module.a.bfloat16(), module.b.bfloat16())
    adapter = Adapter("x", "f", {"one": half})
    packed = pack_adapter(adapter, "int8")
    served = packed.unpack(CPU, torch.bfloat16).modules["one"]
    assert served.a.dtype == served.b.dtype == torch.bfloat16 and served.a.is_contiguous() and served.b.is_contiguous()
    exact = half.b.double() @ half.a.double()
    dense = float((exact - served.b.double() @ served.a.double()).norm() / exact.norm())
    assert adapter_error(adapter, packed) == pytest.approx(dense, rel=1e-9)


def test_gate_tensors_stay_exact_and_count() -> None:
    gates = {"arrow.one": torch.randn(70)}
    adapter = Adapter("x", "f", {"one": low_rank(1, 2)}, gates)
    packed = pack_adapter(adapter, "int4")
    assert torch.equal(packed.unpack(CPU, torch.float32).gate_tensors["arrow.one"], gates["arrow.one"])
    assert packed.nbytes == pack_adapter(Adapter("x", "f", adapter.modules), "int4").nbytes + 280


@pytest.mark.parametrize("storage", ["int8", "int4", "auto"])
def test_the_bank_says_how_it_keeps_an_expert(
    make_bank: Callable[..., AdapterBank], many_folders: list[Path], base: Any, storage: str
) -> None:
    exact = make_bank()
    bank = make_bank(storage=storage, tolerance=0.02)
    for key, folder in zip("abc", many_folders, strict=False):
        kept = bank.storage(bank.add(key, folder).key)
        assert kept.kind == {"auto": "int8"}.get(storage, storage)
        true = exact.wait([exact.add(key, folder)]).adapters[0]
        served = bank.wait([bank.resolve(key)]).adapters[0]
        errors = [update_error(true.modules[name], served.modules[name]) for name in true.modules]
        assert kept.error == max(errors) > 0
    counters = bank.counters
    assert counters.host_bytes == sum(bank.storage(key).host_bytes for key in "abc") < counters.device_bytes / 2
    assert counters.bytes_uploaded == counters.device_bytes


def test_logits_move_by_as_much_as_the_error_says(
    tiny_base: Path, make_adapter: Callable[..., Path], lm_on_cpu: Any
) -> None:
    """The shift of the logits, relative to the expert's whole effect on them, is of the order of the reported error."""
    from xpert.experts.engines._lora_layers import applied
    from xpert.experts.engines._lora_plan import COSTS, Planner, RowMixture

    folder = make_adapter(seed=3, scale=0.05)
    ids = torch.arange(24)[None]

    def logits(adapter: Adapter | None) -> torch.Tensor:
        rows = [RowMixture(((adapter, 1.0),)) if adapter else RowMixture()]
        with torch.inference_mode(), applied(lm_on_cpu.model, Planner(COSTS["cpu"]).make_plan(rows, 24)):
            found: torch.Tensor = lm_on_cpu.model(input_ids=ids).logits
        return found

    shifts = {}
    plain = logits(None)
    for storage in ("native", "int8", "int4"):
        bank = AdapterBank(lm_on_cpu, ResidencyOptions(storage=storage))
        with bank.wait([bank.add("x", folder)]) as lease:
            shifts[storage] = (logits(lease.adapters[0]), bank.storage("x").error)
        bank.close()
    exact = shifts["native"][0]
    effect = (exact - plain).norm()
    for storage in ("int8", "int4"):
        found, error = shifts[storage]
        relative = float((found - exact).norm() / effect)
        assert error / 5 < relative < error * 2


def test_bad_options_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown storage 'int5'"):
        ResidencyOptions(storage="int5")
    with pytest.raises(BadInput, match="device-experts is 0; the least is 1"):
        ResidencyOptions(device_experts=0)
    with pytest.raises(BadInput, match="tolerance is 2; the most is 1"):
        ResidencyOptions(tolerance=2)
    assert ResidencyOptions.from_mapping({"device-bytes": "none", "host-bytes": "5"}).host_bytes == 5
