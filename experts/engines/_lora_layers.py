"""Linear layers that add their rows' LoRA updates, for the time of a `with` block and not a moment longer.

`applied` shadows `forward` in the instances of the layers a plan touches and takes the shadows away in any case, so
that an exception leaves the model as it was: no wrapper modules, no renamed parameters, no hooks, no state. Shadowing
keeps torch's fast path in `Module.__call__`, which hooks would leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.engines._lora_plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["applied"]

_ABSENT = object()
_Parts = list[tuple[int, int, "torch.Tensor", "torch.Tensor", "torch.Tensor | None"]]


@contextmanager
def applied(model: Any, plan: Plan) -> Iterator[None]:
    """Within the block, `model` computes each batch row with the experts that `plan` gives it.

    The batch's rows must be those the plan was made for, in that order. One thread at a time: the model is shared.
    """
    shadowed: list[tuple[dict[str, Any], Any]] = []
    try:
        for name, parts in plan.modules.items():
            module = model.get_submodule(name)
            own = module.__dict__
            # accelerate and others shadow `forward` too: theirs is called inside ours, and put back afterwards.
            shadowed.append((own, own.get("forward", _ABSENT)))
            own["forward"] = _with_updates(name, module.forward, plan.rows, parts)
        yield
    finally:
        for own, earlier in reversed(shadowed):
            if earlier is _ABSENT:
                own.pop("forward", None)
            else:
                own["forward"] = earlier


def _with_updates(
    name: str, forward: Callable[..., torch.Tensor], rows: int, parts: _Parts
) -> Callable[..., torch.Tensor]:
    """x [rows, tokens, in] -> forward(x) plus each segment's update, added in place: forward's result is fresh."""

    def updated(x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or x.shape[0] != rows:
            # A routed feed-forward layer, for one, mixes the rows: whose token is whose cannot be told any more.
            raise BadInput(
                f"{name} of the base model gets {list(x.shape)} for {rows} requests, which cannot be told apart in it",
                hint="train the experts without that module among target_modules",
            )
        y = forward(x)
        for start, stop, a, b, weights in parts:
            h = x[start:stop] @ a.T
            if weights is not None:
                h *= weights
            # A slice of rows of a contiguous result is contiguous, so the views are free.
            y[start:stop].view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.T)
        return y

    return updated
