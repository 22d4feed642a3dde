"""The report of a selection is one file, says what was chosen, and escapes what strangers wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert.data import pool_from_rows
from xpert.features import FeatureOptions, Features
from xpert.protocols import Selection
from xpert.records import Message, Row, Shots
from xpert.report.page import figure, histogram, line_chart
from xpert.report.selection_report import project, write_selection_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def report(path: Path, rows: list[Row], chosen: list[int], shots: Shots | None, *, scored: bool = True) -> str:
    features = Features(pool_from_rows(rows), FeatureOptions(), shots=shots)
    scores = np.linspace(1, 0, len(rows), dtype=np.float32)
    selection = Selection(
        np.array(chosen, dtype=np.int64), scores[chosen], ["near"] * len(chosen), pool_scores=scores if scored else None
    )
    manifest: dict[str, Any] = {
        "config": {"method": "kshot", "budget": str(len(chosen))},
        "figures": {"rows": len(chosen)},
    }
    write_selection_report(path, features=features, selection=selection, shots=shots, manifest=manifest)
    return path.read_text(encoding="utf-8")


def test_it_is_self_contained_and_holds_what_was_chosen(tmp_path: Path, rows: list[Row]) -> None:
    text = report(tmp_path / "report.html", rows, [0, 5, 10], Shots((rows[15],)))
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "Map of the pool" in text
    assert rows[0].response in text
    assert rows[15].prompt.split("\n")[0] in text
    assert "Just missed" in text
    assert "below the last row taken" in text


def test_strangers_texts_are_escaped(tmp_path: Path, rows: list[Row]) -> None:
    evil = [Row(f"e{n}", (Message("user", f"{HOSTILE} {n}"),), HOSTILE, HOSTILE) for n in range(3)]
    text = report(tmp_path / "report.html", [*evil, *rows], [0, 1], Shots((evil[2],)))
    assert "<script>alert" not in text
    assert "<img" not in text


@pytest.mark.parametrize("count", [1, 2, 3, 31])
def test_small_pools_have_a_report_too(tmp_path: Path, rows: list[Row], count: int) -> None:
    assert "Map of the pool" in report(tmp_path / "report.html", rows[:count], [0], None, scored=False)


def test_the_map_keeps_neighbours_together() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 16, dtype=np.float32)[np.repeat([0, 1, 2], 40)]
    placed = project((centres + 0.05 * rng.normal(size=centres.shape)).astype(np.float32))
    assert placed.shape == (120, 2)
    assert placed.min() >= 0
    assert placed.max() <= 1
    groups = placed.reshape(3, 40, 2)
    spread = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=2).mean()
    apart = min(np.linalg.norm(groups[a].mean(axis=0) - groups[b].mean(axis=0)) for a, b in [(0, 1), (0, 2), (1, 2)])
    assert apart > 3 * spread


def test_charts_of_nothing_are_empty() -> None:
    assert histogram({"none": ("red", [float("nan")])}, unit="x") == ""
    assert line_chart([("none", "red", [], [])], unit="x") == ""
    assert "polyline" in line_chart([("one", "red", [1, 2], [3, float("nan")])], unit="x")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345, "12,345"), (0.87349, "0.873"), (True, "yes"), (None, "–"), ("x", "x"), (1234.5, "1,234")],
)
def test_figures_read_well(value: Any, shown: str) -> None:
    assert figure(value) == shown
