"""Facility location's fast forms against plain greedy: the exact one row for row, the one over cells by its value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.budgeting import BudgetMeter
from xpert.selectors import _cells, facility
from xpert.selectors._coverage import SIMILARITIES, SquareCoverage, take_greedily

few = settings(max_examples=15, deadline=None)


def rows_of(kind: str, count: int, seed: int, d: int = 16) -> Any:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(count, d))
    if kind == "clustered":
        drawn = 4 * rng.normal(size=(12, d))[rng.integers(0, 12, count)] + drawn
    elif kind == "repeated":
        drawn = drawn[rng.integers(0, max(1, count // 8), count)]
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def whole(embeddings: Any, form: str) -> Any:
    """Similarities in whole millionths, of which sums are exact."""
    return np.rint(SIMILARITIES[form](embeddings @ embeddings.T) * np.float32(1e6)).astype(np.int64)


def plain_greedy(similar: Any, wanted: int) -> tuple[list[int], list[float]]:
    taken: list[int] = []
    gains: list[float] = []
    covered = np.zeros(len(similar), dtype=np.int64)
    for _ in range(wanted):
        gain = np.maximum(similar - covered, 0).sum(axis=1)
        gain[taken] = -1
        taken.append(int(gain.argmax()))
        gains.append(gain.max() / 1e6)
        covered = np.maximum(covered, similar[taken[-1]])
    return taken, gains


@few
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 150),
    kind=st.sampled_from(["isotropic", "clustered", "repeated"]),
    form=st.sampled_from(sorted(SIMILARITIES)),
)
def test_gains_kept_up_to_date_are_plain_greedy(seed: int, rows: int, kind: str, form: str) -> None:
    embeddings = rows_of(kind, rows, seed)
    cover = SquareCoverage(embeddings, SIMILARITIES[form])
    taken, gains, _ = take_greedily([cover], [np.arange(rows)], BudgetMeter(rows))
    plain, plain_gains = plain_greedy(whole(embeddings, form), rows)
    assert taken == plain
    assert gains == plain_gains


def test_the_square_is_filled_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpert.selectors._coverage._TILE", 16)
    embeddings = rows_of("isotropic", 75, 3)
    cover = SquareCoverage(embeddings, SIMILARITIES["clip"])
    taken, _, _ = take_greedily([cover], [np.arange(75)], BudgetMeter(40))
    assert taken == plain_greedy(whole(embeddings, "clip"), 40)[0]


@pytest.mark.parametrize("kind", ["isotropic", "clustered", "repeated"])
@pytest.mark.parametrize("form", sorted(SIMILARITIES))
def test_cells_reach_the_value_of_the_exact_greedy(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cells, "ROWS_PER_CELL", 60)
    monkeypatch.setattr(facility, "LEAST_WIDTH", 40)
    embeddings = rows_of(kind, 1500, 1)
    meter = BudgetMeter(100)
    cover, log = facility._over_cells(embeddings, SIMILARITIES[form], meter, np.random.default_rng(0))
    taken, _, _ = take_greedily([cover], [np.arange(1500)], meter)
    similar = whole(embeddings, form)
    exact, _ = plain_greedy(similar, 100)
    assert similar[taken].max(axis=0).sum() >= 0.995 * similar[exact].max(axis=0).sum()
    assert log["kept"] >= _cells.KEPT
    assert log["searched"] < log["count"]


def test_data_without_structure_are_searched_in_more_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cells, "ROWS_PER_CELL", 60)
    graphs = [
        _cells.cell_graph(rows_of(kind, 1500, 2, d), 15, 45, np.random.default_rng(0))
        for kind, d in (("clustered", 16), ("isotropic", 16), ("isotropic", 128))
    ]
    needed = [graph.searched for graph in graphs]
    assert needed == sorted(needed) and needed[0] < needed[1] < needed[2]
    monkeypatch.setattr(_cells, "SEARCHED", 120)
    cut = _cells.cell_graph(rows_of("isotropic", 1500, 2, 128), 15, 45, np.random.default_rng(0))
    assert cut.searched == 2 and cut.kept < _cells.KEPT  # and says so


@few
@given(seed=st.integers(0, 10_000), width=st.integers(1, 40), columns=st.integers(1, 900))
def test_lists_hold_the_most_similar(seed: int, width: int, columns: int) -> None:
    block = np.random.default_rng(seed).normal(size=(7, columns)).astype(np.float32)
    at, sizes, limits = _cells._most_similar(block, width)
    assert sizes.sum() == len(at)
    for row, (mine, limit) in enumerate(zip(np.split(at, np.cumsum(sizes)[:-1]), limits, strict=True)):
        assert (mine // columns == row).all()
        assert set(mine % columns) == set(np.argsort(-block[row])[: len(mine)])
        assert block[row, mine % columns].min() == limit
        assert len(mine) == min(width, columns) or columns > 16 * width


def test_long_lists_of_equal_rows_are_cut() -> None:
    at, sizes, limits = _cells._most_similar(np.ones((3, 500), np.float32), 5)
    assert sizes.tolist() == [5, 5, 5] and len(at) == 15 and limits.tolist() == [1, 1, 1]


@pytest.mark.parametrize("vector", [np.eye(1, 8), np.zeros((1, 8))], ids=["all alike", "all empty"])
def test_cells_of_equal_rows(vector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cells, "SEARCHED", 100)
    embeddings = np.repeat(vector, 450, axis=0).astype(np.float32)
    cover, _ = facility._over_cells(embeddings, SIMILARITIES["clip"], BudgetMeter(450), np.random.default_rng(0))
    taken, _, _ = take_greedily([cover], [np.arange(450)], BudgetMeter(450))
    assert sorted(taken) == list(range(450))
