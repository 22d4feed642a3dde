"""Training as a step of a selection: adapters kept where features are kept, and features seen by a trained base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from xpert.lora_training import Checkpoint, LoraOptions, warm_up
from xpert.records import Row

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["adapters", "by_base", "trained_base"]


@contextmanager
def adapters(features: Features, rows: Sequence[Row], options: LoraOptions) -> Iterator[list[Checkpoint]]:
    """The checkpoints of a training on `rows`, one an epoch; without rows the new adapter, which changes nothing.

    Kept among the features and found again; where these are not kept on disk, gone afterwards.
    """
    with _scratch(None) if features.folder is None else nullcontext(features.folder) as folder:
        yield warm_up(
            features.base(),
            rows,
            options,
            folder,
            device=features.device,
            seed=features.seed,
            progress=features.progress,
        )


@contextmanager
def trained_base(features: Features, rows: Sequence[Row], options: LoraOptions) -> Iterator[str]:
    """A model folder: the base, with an adapter trained on `rows` merged into it. It is removed afterwards."""
    from xpert.merged_model import write_merged

    with adapters(features, rows, options) as checkpoints, _scratch(features.folder) as folder:
        yield str(write_merged(features.base(), checkpoints[-1], folder / "model", device=features.device))


def by_base(features: Features, base: str) -> Features:
    """The same features, whose model passes are of `base` instead."""
    return cast("Features", _ByBase(features, base))


class _ByBase:
    def __init__(self, features: Features, base: str) -> None:
        self._features, self._base = features, base

    def base(self) -> str:
        return self._base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._features, name)


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """A new folder in `folder`, which a model may fill: the system's own place for such may be memory."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="xpert-", dir=folder) as name:
        yield Path(name)
