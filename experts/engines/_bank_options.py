"""What an adapter bank is told and what it tells: its limits, names for its contents, and its counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from xpert.config import Config, option

__all__ = ["STORAGES", "Counters", "Handle", "ResidencyOptions", "Storage"]

STORAGES = ("native", "int8", "int4", "auto")


@dataclass(frozen=True)
class ResidencyOptions(Config):
    """How much an adapter bank may hold, and in which form."""

    device_bytes: int | None = option(
        None,
        "bytes of adapters that the device holds at once; what batches make of them may take as much (none: no limit)",
        minimum=1,
    )
    device_experts: int | None = option(None, "adapters that the device holds at once (none: no limit)", minimum=1)
    host_bytes: int | None = option(
        None,
        "bytes of adapters kept in host memory for the device; the others stay on disk (none: no limit)",
        minimum=0,
    )
    storage: str = option(
        "native",
        "form of the adapters in host memory: the base's dtype, 8 or 4 bits a weight, or for each the fewest bits "
        "that keep its error within the tolerance",
        choices=STORAGES,
    )
    tolerance: float = option(
        0.01, "largest relative error of an expert's update that storage auto accepts", minimum=0, maximum=1
    )
    patience: int = option(
        64, "leases that others may take of room that an expert waits for, before room is kept for it", minimum=1
    )


@dataclass(frozen=True)
class Storage:
    """How an expert is kept in host memory. `kind`: native, int8 or int4.

    `error` is the relative Frobenius error of its update, ||BA - B'A'|| / ||BA||, B' and A' as they are served, in the
    module where it is largest.
    """

    kind: str
    error: float
    host_bytes: int


@dataclass(frozen=True)
class Handle:
    """One version of an expert: a key, and the content it stood for when it was resolved.

    `device_bytes` is what it takes on the device: both matrices of all modules, and its gates' tensors.
    """

    key: str
    fingerprint: str
    folder: Path = field(compare=False)
    device_bytes: int = field(compare=False)
    storage: Storage = field(compare=False)


@dataclass(frozen=True)
class Counters:
    """What a bank has done so far, and what it holds now.

    hits + misses = adapters leased; a hit was on the device when it was first asked for. uploads - evictions =
    resident, and loads - host_evictions = in_host: what leaves a tier counts as evicted, whether for want of room or
    because it was removed or replaced, and so does what only passes through host memory. bytes_uploaded counts what
    was copied, which is nothing where both tiers are the same memory. device_bytes includes an adapter on its way.
    """

    hits: int
    misses: int
    loads: int
    uploads: int
    evictions: int
    host_evictions: int
    bytes_loaded: int
    bytes_uploaded: int
    device_bytes: int
    host_bytes: int
    experts: int
    resident: int
    in_host: int
