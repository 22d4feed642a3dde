"""Adapters in fewer bits for host memory: symmetric int8 and int4 in groups of 32, and what that costs in accuracy.

Both matrices are laid out with the rank first, A as [rank, in] and B transposed as [rank, out], and each row is cut
into groups of 32 weights with one bfloat16 scale: weight = code * scale, codes from -127 to 127 or -7 to 7. A group
never mixes ranks, whose magnitudes differ, and is long enough for the scale to cost little: 8.5 and 4.5 bits a weight
(one scale for each output of B would cost as much as B itself at rank 2 to 4). int4 codes lie two to a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from xpert.experts.adapters import Adapter, LowRank
from xpert.experts.engines._bank_options import Storage

__all__ = [
    "GROUP",
    "PackedAdapter",
    "PackedLowRank",
    "PackedMatrix",
    "adapter_error",
    "choose_storage",
    "pack_adapter",
    "pack_matrix",
    "update_error",
]

GROUP = 32
"""Weights that share a scale."""
_LARGEST = {8: 127, 4: 7}
_CLIPS = {8: (1.0,), 4: (1.0, 0.94, 0.88, 0.82)}
"""Shares of a group's largest weight tried as its range: with 15 levels, clipping one weight can serve 31 others."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A [rows, columns] matrix. codes: int8 [rows, padded], or uint8 [rows, padded / 2], low half first;
    scales: bfloat16 [rows, padded / GROUP]; padded: columns rounded up to a whole group."""

    codes: torch.Tensor
    scales: torch.Tensor
    columns: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def unpack(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in `dtype`, computed on `device`, so that what travels there is the packed form."""
        codes = self.codes.to(device, non_blocking=True)
        scales = self.scales.to(device, non_blocking=True)
        if codes.dtype == torch.uint8:
            halves = torch.stack([codes & 15, codes >> 4], dim=-1)
            codes = halves.flatten(-2).to(torch.int8) - 8
        rows, padded = codes.shape
        weights = codes.view(rows, padded // GROUP, GROUP).float() * scales.float()[:, :, None]
        return weights.view(rows, padded)[:, : self.columns].to(dtype).contiguous()

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedMatrix:
        return PackedMatrix(move(self.codes), move(self.scales), self.columns)


@dataclass(frozen=True, eq=False)
class PackedLowRank:
    """A module's a [rank, in], and its b transposed, [rank, out]."""

    a: PackedMatrix
    b: PackedMatrix

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def unpack(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        return LowRank(self.a.unpack(device, dtype), self.b.unpack(device, dtype).T.contiguous())

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedLowRank:
        return PackedLowRank(self.a.moved(move), self.b.moved(move))


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter as host memory holds it: its modules packed, or as they are for native storage."""

    key: str
    fingerprint: str
    modules: Mapping[str, LowRank | PackedLowRank]
    gate_tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        modules = sum(
            module.a.nbytes + module.b.nbytes if isinstance(module, LowRank) else module.nbytes
            for module in self.modules.values()
        )
        return modules + sum(tensor.nbytes for tensor in self.gate_tensors.values())

    def unpack(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The adapter to be served. Native tensors that are where and what they should be are shared, not copied."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype, non_blocking=True)

        modules = {
            name: LowRank(move(module.a), move(module.b))
            if isinstance(module, LowRank)
            else module.unpack(device, dtype)
            for name, module in self.modules.items()
        }
        gates = {name: tensor.to(device, non_blocking=True) for name, tensor in self.gate_tensors.items()}
        return Adapter(self.key, self.fingerprint, modules, gates)

    def pinned(self) -> PackedAdapter:
        """A copy in page-locked memory, from which CUDA copies without waiting."""

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory()

        modules = {
            name: LowRank(pin(module.a), pin(module.b)) if isinstance(module, LowRank) else module.moved(pin)
            for name, module in self.modules.items()
        }
        return PackedAdapter(
            self.key, self.fingerprint, modules, {name: pin(tensor) for name, tensor in self.gate_tensors.items()}
        )


def choose_storage(adapter: Adapter, storage: str, tolerance: float) -> tuple[PackedAdapter, Storage]:
    """`adapter`, which lies on the CPU, in the form `storage` asks for, and what that form does to its update.

    auto takes the fewest bits whose error is within `tolerance`: int4, int8, or else native.
    """
    kinds = {"auto": ("int4", "int8", "native")}.get(storage, (storage,))
    for kind in kinds:
        packed = pack_adapter(adapter, kind)
        error = adapter_error(adapter, packed)
        if storage != "auto" or error <= tolerance:
            break
    return packed, Storage(kind, error, packed.nbytes)


def pack_adapter(adapter: Adapter, kind: str) -> PackedAdapter:
    """`adapter` as native (its own tensors), int8 or int4. Gate tensors stay as they are."""
    modules: Mapping[str, LowRank | PackedLowRank] = adapter.modules
    if kind != "native":
        bits = int(kind.removeprefix("int"))
        modules = {
            name: PackedLowRank(pack_matrix(module.a, bits), pack_matrix(module.b.T, bits))
            for name, module in adapter.modules.items()
        }
    return PackedAdapter(adapter.key, adapter.fingerprint, modules, adapter.gate_tensors)


def adapter_error(adapter: Adapter, packed: PackedAdapter) -> float:
    """The largest `update_error` over the modules, of the weights as they are served, in the adapter's dtype."""
    worst = 0.0
    for name, served in packed.modules.items():
        if isinstance(served, PackedLowRank):
            module = adapter.modules[name]
            worst = max(worst, update_error(module, served.unpack(module.a.device, module.a.dtype)))
    return worst


def pack_matrix(matrix: torch.Tensor, bits: int) -> PackedMatrix:
    """Rounds a finite [rows, columns] matrix to `bits` (8 or 4) in groups of 32 along the columns.

    Of a few ranges for each group the one with the least squared error is taken.
    """
    rows, columns = matrix.shape
    padded = -(-columns // GROUP) * GROUP
    weights = torch.nn.functional.pad(matrix.float(), (0, padded - columns)).view(rows, padded // GROUP, GROUP)
    largest = weights.abs().amax(-1, keepdim=True)
    codes = scales = least = None
    for clip in _CLIPS[bits]:
        # Codes are chosen for the scale as it is stored, so that rounding the scale costs nothing but clipping.
        scale = (largest * (clip / _LARGEST[bits])).bfloat16().float()
        code = (weights / scale.where(scale > 0, torch.ones(()))).round_().clamp_(-_LARGEST[bits], _LARGEST[bits])
        loss = (code * scale - weights).square_().sum(-1, keepdim=True)
        if codes is None or scales is None or least is None:
            codes, scales, least = code, scale, loss
        else:
            better = loss < least
            codes, scales = torch.where(better, code, codes), torch.where(better, scale, scales)
            least = torch.minimum(loss, least)
    assert codes is not None and scales is not None
    whole = codes.view(rows, padded).to(torch.int8)
    if bits == 4:
        halves = (whole + 8).view(torch.uint8)
        whole = halves[:, 0::2] | (halves[:, 1::2] << 4)
    return PackedMatrix(whole.contiguous(), scales[:, :, 0].bfloat16(), columns)


def update_error(exact: LowRank, served: LowRank) -> float:
    """||BA - B'A'|| / ||BA||, Frobenius, by r x r traces in float64: never an out x in matrix.

    BA - B'A' = [B - B', B'] [A; A - A'], whose squared norm is tr(L^T L R R^T): differences are taken before the
    squares, so small errors do not cancel. 0 where nothing differs, infinite where BA is zero and B'A' is not.
    """
    a, b, a2, b2 = (matrix.double() for matrix in (exact.a, exact.b, served.a, served.b))
    left, right = torch.cat([b - b2, b2], dim=1), torch.cat([a, a - a2])
    difference, norm = _product_norm(left, right), _product_norm(b, a)
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left right|| for left [out, r] and right [r, in]."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
