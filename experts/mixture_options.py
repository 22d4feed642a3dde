"""The options of `xpert train --mixture` besides those of training."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option

__all__ = ["MixtureOptions"]


@dataclass(frozen=True)
class MixtureOptions(Config):
    """What `xpert train --mixture` takes besides the options of training."""

    freeze_experts: bool = option(False, "with --mixture: train the router alone and leave the experts as they are")
