"""Keys and values of the rows in flight: rows of unequal length, left-padded, that join and leave between steps.

The tensors grow in place by spare room, where transformers' own cache copies everything for every token. All layers
keep the full context; a sliding-window model masks what its window has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from xpert.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["RowCache", "begin", "check_cacheable", "gather"]

SPARE = 64
"""Positions allocated beyond those needed."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """keys, values [rows, heads, length, width]: views of the filled part of larger tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Appends the new positions; time O(new), and O(all) when the room is used up."""
        if not self.is_initialized:
            self.replace(key_states, value_states)
            return key_states, value_states
        old_keys, old_values = self.filled()
        before = old_keys.shape[-2]
        after = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after:
            room = after + max(SPARE, after // 4)
            self._room = (_roomy(old_keys, room), _roomy(old_values, room))
        keys, values = self._room
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values, self._room = keys, values, None
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def _roomy(filled: torch.Tensor, room: int) -> torch.Tensor:
    rows, heads, length, width = filled.shape
    larger = filled.new_empty(rows, heads, room, width)
    larger[:, :, :length] = filled
    return larger


class RowCache(Cache):
    """An empty cache for a model of this configuration."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.grown = [GrowingLayer() for _ in DynamicCache(config=config).layers]
        super().__init__(layers=list(self.grown))

    @property
    def width(self) -> int:
        """Positions it holds, padding included."""
        return int(self.get_seq_length())

    def head(self, count: int) -> RowCache:
        """The first `count` positions: a view, which must not grow."""
        cut = RowCache(self.config)
        for layer, whole in zip(cut.grown, self.grown, strict=True):
            keys, values = whole.filled()
            layer.replace(keys[:, :, :count], values[:, :, :count])
        return cut

    def part(self, row: int, start: int, stop: int) -> RowCache:
        """A copy of one row's positions start..stop."""
        copied = RowCache(self.config)
        for layer, whole in zip(copied.grown, self.grown, strict=True):
            keys, values = (side[row : row + 1, :, start:stop].clone() for side in whole.filled())
            layer.replace(keys, values)
        return copied

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for layer in self.grown for part in layer.filled())


def check_cacheable(config: PreTrainedConfig, *, where: str) -> None:
    """Raises BadInput for models whose state is more than one key and value per layer and position."""
    odd = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if odd:
        names = ", ".join(sorted(kind.__name__ for kind in odd))
        raise BadInput(
            f"models of type {config.model_type} keep a state ({names}) that the engine cannot batch",
            where=where,
            hint="use a decoder with plain attention",
        )


def gather(sources: Sequence[tuple[RowCache, int]], width: int, config: PreTrainedConfig) -> RowCache:
    """A new cache whose row t is row `sources[t][1]` of the cache `sources[t][0]`, left-padded or cut to `width`.

    One copy does it all: rows leave, join, change places or are repeated. Time and memory O(rows x width).
    """
    taken: dict[int, tuple[RowCache, list[int], list[int]]] = {}
    for target, (cache, row) in enumerate(sources):
        _, targets, rows = taken.setdefault(id(cache), (cache, [], []))
        targets.append(target)
        rows.append(row)
    gathered = RowCache(config)
    for position, layer in enumerate(gathered.grown):
        parts = [(cache.grown[position].filled(), targets, rows) for cache, targets, rows in taken.values()]
        layer.replace(
            _gathered([(keys, targets, rows) for (keys, _), targets, rows in parts], len(sources), width),
            _gathered([(values, targets, rows) for (_, values), targets, rows in parts], len(sources), width),
        )
    return gathered


def begin(heads: Sequence[RowCache | None], counts: Sequence[int], width: int, config: PreTrainedConfig) -> RowCache:
    """A new cache whose row t holds the first `counts[t]` positions of the one row of `heads[t]`, at its right end.

    A row with count 0 is padding alone. Time and memory O(rows x width).
    """
    begun = RowCache(config)
    first = next(head for head in heads if head is not None)
    taken: dict[tuple[int, int], tuple[RowCache, list[int]]] = {}
    for target, (head, count) in enumerate(zip(heads, counts, strict=True)):
        if head is not None and count > 0:
            taken.setdefault((id(head), count), (head, []))[1].append(target)
    for position, layer in enumerate(begun.grown):
        made = []
        for side, like in enumerate(first.grown[position].filled()):
            result = like.new_zeros(len(heads), like.shape[1], width, like.shape[3])
            for (_, count), (head, targets) in taken.items():
                place = torch.tensor(targets, device=like.device)
                result[place, :, width - count :] = head.grown[position].filled()[side][:, :, :count]
            made.append(result)
        layer.replace(made[0], made[1])
    return begun


def _gathered(parts: Sequence[tuple[torch.Tensor, list[int], list[int]]], count: int, width: int) -> torch.Tensor:
    first = parts[0][0]
    # Padding is zero, not left as it was: the mask gives it no weight, but no weight times NaN is NaN.
    result = first.new_zeros(count, first.shape[1], width, first.shape[3])
    for old, targets, rows in parts:
        used = min(width, old.shape[2])
        place = torch.tensor(targets, device=old.device)
        result[place, :, width - used :] = old[:, :, old.shape[2] - used :][torch.tensor(rows, device=old.device)]
    return result
