"""Blocks change nothing: each function equals its plain form on the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.protocols import Floats
from xpert.similarity import max_similarity, nearest, similarity_blocks


def rows_of(seed: int, count: int, levels: int = 3) -> Floats:
    """Rows of few whole numbers: cosines are exact, and tie often."""
    return np.random.default_rng(seed).integers(-levels, levels + 1, (count, 4)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 300))
def test_blocks_cover_the_matrix(seed: int, n: int, m: int, cells: int) -> None:
    left, right = rows_of(seed, n), rows_of(seed + 1, m)
    seen = np.full((n, m), np.nan, np.float32)
    for start, block in similarity_blocks(left, right, cells=cells):
        seen[start : start + len(block)] = block
    np.testing.assert_array_equal(seen, left @ right.T)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 300))
def test_max_similarity_equals_the_plain_form(seed: int, n: int, m: int, cells: int) -> None:
    rows, anchors = rows_of(seed, n), rows_of(seed + 1, m)
    best, which = max_similarity(rows, anchors, cells=cells)
    np.testing.assert_array_equal(best, (rows @ anchors.T).max(axis=1))
    np.testing.assert_array_equal(which, (rows @ anchors.T).argmax(axis=1))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 50), st.integers(1, 300), st.booleans())
def test_nearest_equals_a_stable_sort(seed: int, n: int, k: int, cells: int, skip_self: bool) -> None:
    rows = rows_of(seed, n, levels=1)
    cosines, indices = nearest(rows, rows, k, skip_self=skip_self, cells=cells)
    plain = rows @ rows.T
    if skip_self:
        np.fill_diagonal(plain, -np.inf)
    width = min(k, n - skip_self)
    expected = np.argsort(-plain, axis=1, kind="stable")[:, :width]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(cosines, np.take_along_axis(plain, expected, axis=1))


def test_no_anchors_are_refused() -> None:
    with pytest.raises(ValueError, match="no anchors"):
        max_similarity(rows_of(0, 3), np.zeros((0, 4), np.float32))
