"""The report of a comparison: overlap, skill mix, likeness and cost of several methods beside random draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.report.page import write_page

if TYPE_CHECKING:
    from xpert.comparison import Comparison

__all__ = ["write_comparison_report"]

_SKILLS = 8
_COLUMNS = {
    "rows": "rows",
    "tokens": "tokens",
    "shot_similarity": "to shots",
    "alike": "alike",
    "coverage": "coverage",
    "clusters": "clusters",
    "rows_scored": "scored",
    "select_seconds": "method, s",
    "cpu_seconds": "all, CPU s",
}


def write_comparison_report(path: Path, comparison: Comparison, *, pool_rows: int) -> None:
    """Writes one self-contained file; cost next to nothing."""
    names = list(comparison.selections)
    shown = {
        key: label
        for key, label in _COLUMNS.items()
        if any(f.get(key) is not None for f in comparison.figures.values())
    }
    sizes = [comparison.figures[name]["rows"] for name in names]
    write_page(
        path,
        "comparison.html.jinja",
        title=f"{len([n for n in names if not n.startswith('random-')])} methods on one budget",
        lead=f"{max(sizes):,} of {pool_rows:,} rows each, beside three random draws",
        names=names,
        columns=list(shown.items()),
        figures=comparison.figures,
        overlap=comparison.overlap.round(3).tolist(),
        expected=sum(sizes) / len(sizes) / pool_rows,
        skills=_skill_table(comparison.figures),
    )


def _skill_table(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The skills that any method takes most of, and each method's shares of them."""
    peak: dict[str, float] = {}
    for measured in figures.values():
        for skill, count in measured["skills"].items():
            peak[skill] = max(peak.get(skill, 0.0), count / measured["rows"])
    skills = sorted(peak, key=lambda skill: (-peak[skill], skill))
    if skills in ([], ["unknown"]):
        return {}
    shares = {
        name: [measured["skills"].get(skill, 0) / measured["rows"] for skill in skills[:_SKILLS]]
        for name, measured in figures.items()
    }
    return {"skills": skills[:_SKILLS], "shares": shares, "left": max(0, len(skills) - _SKILLS)}
