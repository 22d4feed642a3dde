"""Mixed load on a server of its own while experts come and go; `make reliability` has ten minutes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks import server_load
from xpert.registry.opening import open_registry

FULL = os.environ.get("XPERT_RELIABILITY") == "full"
SECONDS = 600.0 if FULL else 12.0


def test_a_server_under_mixed_load_loses_nothing(make_expert: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_expert(("casing", "arithmetic")[seed % 2], seed=seed) for seed in range(6)]
    registry = open_registry(str(tmp_path / "registry"))
    command = server_load.serve_command(server_load.prepare(registry, folders, tmp_path), registry.location)
    report = server_load.run(command, registry, folders, seconds=SECONDS, clients=16, pause=1.0)
    assert report.faults() == []
    assert report.turns >= 3
    assert report.left["generation"] > 3  # what was published was served
    assert sum(report.tally.done.values()) > 30
    if FULL:
        assert report.growth <= 0.05, report.memory
