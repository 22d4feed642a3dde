"""Two processes that make the same features at once both end well, and leave whole entries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xpert.array_cache import ArrayCache

MAKE = """
import sys
from pathlib import Path
import numpy as np
from xpert.array_cache import ArrayCache
cache = ArrayCache(Path(sys.argv[1]))
for key in range(60):
    found = cache.get_or_make("rows", {"key": key}, lambda: {"rows": np.full((200, 8), key, np.float32)})
    assert (found["rows"] == key).all()
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.iterdir())) == 60
    for key in range(60):
        found = ArrayCache(tmp_path).find("rows", {"key": key})
        assert found is not None and (found["rows"] == key).all()


def test_a_failure_leaves_no_entry(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    with pytest.raises(ValueError, match="pickle"):
        cache.put("rows", {}, {"whole": np.zeros(3), "rows": np.array([object()], dtype=object)})
    assert not list(tmp_path.iterdir())


def test_empty_and_scalar_shapes(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    arrays = {"none": np.zeros((0, 5), np.float32), "one": np.zeros((1, 1), np.int64)}
    stored = cache.put("mixed", {"a": 1}, arrays)
    assert {name: array.shape for name, array in stored.items()} == {"none": (0, 5), "one": (1, 1)}
