"""A vector per expert and module: read from what experts bring along, checked, and stacked for one product.

Tensor code, imported by gates inside `at`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from xpert.errors import BadInput
from xpert.protocols import GatedExpert

__all__ = ["constants", "expert_vectors", "normed", "stack"]


@contextmanager
def constants() -> Iterator[None]:
    """What is made inside takes no gradients, and may be used in inference mode and under autograd alike."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def expert_vectors(gate: str, module: str, experts: Sequence[GatedExpert]) -> list[Tensor | None]:
    """The vector "GATE.MODULE" [in] of each expert; None for an expert that does not adapt the module.

    Raises BadInput naming an expert that adapts it and has no vector for it, or one of another length.
    """
    return [_vector(gate, module, expert) if module in expert.modules else None for expert in experts]


def _vector(gate: str, module: str, expert: GatedExpert) -> Tensor:
    hint = f"make them with `xpert gate EXPERT ROWS --name {gate}`"
    a = expert.modules[module].a
    vector = expert.gate_tensors.get(f"{gate}.{module}")
    if vector is None:
        some = any(name.startswith(f"{gate}.") for name in expert.gate_tensors)
        lacks = f"{gate} vector for {module}" if some else f"{gate} vectors"
        raise BadInput(f"expert {expert.key!r} has no {lacks}", hint=hint)
    if vector.shape != (a.shape[1],):
        raise BadInput(
            f"the {gate} vector of expert {expert.key!r} for {module} is {list(vector.shape)}, not [{a.shape[1]}]",
            hint=hint,
        )
    return vector.to(a.device)


def stack(vectors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
    """float32 [e, in] with zeros for None, and bool [e] telling which are there (None: all). None: none is."""
    there = [vector for vector in vectors if vector is not None]
    if not there:
        return None
    rows = torch.stack([torch.zeros_like(there[0]) if v is None else v for v in vectors]).float()
    present = torch.tensor([v is not None for v in vectors], device=rows.device)
    return rows, None if len(there) == len(vectors) else present


def normed(states: Tensor) -> Tensor:
    """LN(x) without affine terms, in float32: [..., in] -> the same shape. Zeros stay zeros."""
    return functional.layer_norm(states.float(), (states.shape[-1],))
