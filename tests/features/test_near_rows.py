"""Rows that repeat an earlier one: the plain loop's answer, whether looked for everywhere or by clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import near_rows
from xpert.near_rows import first_of_near


def rows(count: int, seed: int, *, d: int = 16, spread: float = 0.2) -> Any:
    random = np.random.default_rng(seed)
    found = random.normal(size=(9, d))[random.integers(9, size=count)] + spread * random.normal(size=(count, d))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def plain(vectors: Any, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in range(len(vectors)):
        if not any(np.round(vectors[row] @ vectors[other], 6) >= threshold for other in kept):
            kept.append(row)
    return kept


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), threshold=st.floats(0.3, 0.99), count=st.integers(1, 80))
def test_rows_that_stay_are_those_of_the_plain_loop(seed: int, threshold: float, count: int) -> None:
    vectors = rows(count, seed)
    assert np.flatnonzero(first_of_near(vectors, threshold)).tolist() == plain(vectors, threshold)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_clusters_find_what_a_look_at_every_pair_finds(
    exact: bool, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = rows(900, 3, d=64)
    everywhere = first_of_near(vectors, threshold)
    monkeypatch.setattr(near_rows, "_PLAIN_ROWS", 100)
    monkeypatch.setattr(near_rows, "_BLOCK", 128)
    assert first_of_near(vectors, threshold, exact=exact).tolist() == everywhere.tolist()
    assert 0 < everywhere.sum() < 900


def test_clusters_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound must save work, else it is no use: most clusters of well-parted rows are never looked at."""
    vectors = rows(2000, 1, d=64, spread=0.05)
    monkeypatch.setattr(near_rows, "_PLAIN_ROWS", 100)
    looked: list[int] = []
    real = near_rows._reaches
    monkeypatch.setattr(
        near_rows, "_reaches", lambda block, kept, t: (looked.append(len(block) * len(kept)), real(block, kept, t))[1]
    )
    kept = int(first_of_near(vectors, 0.999).sum())
    assert sum(looked) < 2000 * kept / 3


def test_equal_and_empty_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_rows, "_PLAIN_ROWS", 10)
    same = np.repeat(rows(1, 0), 50, axis=0)
    assert np.flatnonzero(first_of_near(same, 0.9)).tolist() == [0]
    assert first_of_near(np.zeros((50, 4), np.float32), 0.9).all()
