"""Routers against the oracle as a page: the table, reliability diagrams and risk-coverage curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xpert.experts.router_learning.evaluating import RouterEvaluation, RouterFigures
from xpert.report.page import Series, line_chart, write_page

__all__ = ["write_router_report"]

_COLOURS = ("var(--chosen)", "var(--shot)", "var(--good)", "var(--missed)", "var(--pool)", "var(--soft)")


def write_router_report(path: Path, found: RouterEvaluation) -> None:
    """One self-contained page."""
    risks = [one for one in found.routers if one.risk is not None]
    curves = {
        "Mean score of the accepted prompts": [_risk(one, place, "accepted") for place, one in enumerate(risks)],
        "Mean score of all prompts, the base answering the others": [
            _risk(one, place, "with_base") for place, one in enumerate(risks)
        ],
    }
    write_page(
        path,
        "routers.html.jinja",
        title=f"Routers of {found.mixture}",
        lead=f"{found.oracle.n:,} prompts of the suite {found.suite}, of which every expert's answer was observed. "
        "Brackets are 95 % bootstrap intervals.",
        rows=[_row(one) for one in (*found.routers, *found.controls)],
        routers=len(found.routers),
        reliability=[_reliability(one) for one in found.routers if one.chances is not None],
        curves=[(title, line_chart(series, unit="share of all prompts accepted")) for title, series in curves.items()]
        if risks
        else [],
        fronts=[(one.name, [list(point.items()) for point in one.front]) for one in found.routers if one.front],
    )


def _row(one: RouterFigures) -> dict[str, Any]:
    return {
        "name": one.name,
        "how": one.how,
        "score": one.score,
        "regret": one.regret,
        "shares": [one.accuracy, one.where_it_matters or 0.0, one.to_base, one.escalated],
        "costs": [one.answers, one.parameters, one.milliseconds],
    }


def _reliability(one: RouterFigures) -> dict[str, Any]:
    chances = one.chances
    assert chances is not None
    told = [part.chance for part in chances.bins]
    series: list[Series] = [
        ("as good as said", "var(--pool)", [0.0, 1.0], [0.0, 1.0]),
        ("observed", "var(--chosen)", told, [part.score for part in chances.bins]),
    ]
    return {"name": one.name, "chances": chances, "chart": line_chart(series, unit="chance that the route said")}


def _risk(one: RouterFigures, place: int, what: str) -> Series:
    risk = one.risk
    assert risk is not None
    values = risk.accepted if what == "accepted" else risk.with_base
    return (one.name, _COLOURS[place % len(_COLOURS)], risk.coverage, values)
