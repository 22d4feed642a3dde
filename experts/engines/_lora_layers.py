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
from xpert.experts.engines._lora_plan import Gating, Part, Plan

if TYPE_CHECKING:
    import torch

__all__ = ["Unservable", "applied"]

_ABSENT = object()


class Unservable(BadInput):
    """A layer of this base model cannot take updates; requests whose experts adapt `module` cannot be answered."""

    def __init__(self, module: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.module = module


_Decided = dict[tuple[int, str], "torch.Tensor"]
"""(segment's first row, deciding module) -> the gate's weights there, within one pass."""


@contextmanager
def applied(model: Any, plan: Plan) -> Iterator[None]:
    """Within the block, `model` computes each batch row with the experts that `plan` gives it.

    The batch's rows must be those the plan was made for, in that order. One thread at a time: the model is shared.
    """
    shadowed: list[tuple[dict[str, Any], Any]] = []
    decided: _Decided = {}
    try:
        for name, parts in plan.modules.items():
            module = model.get_submodule(name)
            own = module.__dict__
            # accelerate and others shadow `forward` too: theirs is called inside ours, and put back afterwards.
            shadowed.append((own, own.get("forward", _ABSENT)))
            own["forward"] = _with_updates(name, module.forward, plan.rows, parts, decided)
        yield
    finally:
        for own, earlier in reversed(shadowed):
            if earlier is _ABSENT:
                own.pop("forward", None)
            else:
                own["forward"] = earlier


def _with_updates(
    name: str, forward: Callable[..., torch.Tensor], rows: int, parts: list[Part], decided: _Decided
) -> Callable[..., torch.Tensor]:
    """x [rows, tokens, in] -> forward(x) plus each segment's update, added in place: forward's result is fresh."""

    spans, places = _spans(parts, rows)
    # Transposed views are made once, not in every pass.
    turned = [(part.matrices[0].T, part.matrices[1].T) if part.matrices else None for part in parts]
    work = list(zip(parts, turned, places, strict=True))

    def updated(x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or x.shape[0] != rows:
            # A routed feed-forward layer, for one, mixes the rows: whose token is whose cannot be told any more.
            raise Unservable(
                name,
                f"{name} of the base model gets {list(x.shape)} for {rows} requests, which cannot be told apart in it",
                hint="train the experts without that module among target_modules",
            )
        y = forward(x)
        tokens = x.shape[1]
        # Few small operations a segment are what decoding costs: both sides are cut up once, as matrices.
        sizes = spans if tokens == 1 else [rows * tokens for rows in spans]
        inputs = x.reshape(-1, x.shape[2]).split_with_sizes(sizes)
        outputs = y.view(-1, y.shape[2]).split_with_sizes(sizes)
        for part, matrices, place in work:
            gating = part.gating
            gated = None
            if gating is not None:
                gated = _decide(name, part.start, gating, x[part.start : part.stop], decided)
            if matrices is None:
                continue
            a, b = matrices
            h = inputs[place].mm(a)
            if part.off is not None:
                h.view(part.stop - part.start, tokens, -1).masked_fill_(part.off, 0)
            if gating is not None and gated is not None:
                _weigh(h.view(part.stop - part.start, tokens, -1), gated, gating)
            elif part.weights is not None:
                h.view(part.stop - part.start, tokens, -1).mul_(part.weights)
            outputs[place].addmm_(h, b)
        return y

    return updated


def _spans(parts: list[Part], rows: int) -> tuple[list[int], list[int]]:
    """The batch's rows as consecutive spans, and which span each part is."""
    spans: list[int] = []
    places: list[int] = []
    end = 0
    for part in parts:
        if part.start > end:
            spans.append(part.start - end)
        places.append(len(spans))
        spans.append(part.stop - part.start)
        end = part.stop
    return ([*spans, rows - end] if end < rows else spans), places


def _decide(name: str, start: int, gating: Gating, x: torch.Tensor, decided: _Decided) -> torch.Tensor:
    """The gate's weights for these rows' tokens [rows, tokens, e or R], now or as its site found them before."""
    if gating.site != name:
        found = decided.get((start, gating.site))
        if found is None:
            raise Unservable(
                name, f"the gate of {name} decides at {gating.site}, which the model computes later or not at all"
            )
        return found
    weights = gating.gate(x, gating.allowed, gating.bias)
    if gating.shared:
        decided[(start, name)] = weights
    return weights


def _weigh(h: torch.Tensor, weights: torch.Tensor, gating: Gating) -> None:
    """h [rows, tokens, R] times the weight of each rank's expert, in place."""
    weights = weights.to(h.dtype)
    if gating.even:
        h.view(*weights.shape, gating.even).mul_(weights.unsqueeze(-1))
    elif gating.owners is not None:
        h.mul_(weights.index_select(-1, gating.owners))
    else:
        h.mul_(weights)
    if gating.strengths is not None:
        h.mul_(gating.strengths)
