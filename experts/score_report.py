"""Scores and answers of several subjects side by side, as a page or as sections of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xpert.experts.evaluate import Evaluation
from xpert.registry.ranking import borda
from xpert.report.page import write_page

__all__ = ["score_sections", "write_score_report"]

SAMPLES = 24


def write_score_report(path: Path, found: Evaluation, *, title: str, lead: str) -> None:
    """One self-contained page: scores per skill with intervals, and answers side by side."""
    lead = f"{len(found.items):,} items, {lead}. Brackets are 95 % bootstrap intervals."
    write_page(path, "scores.html.jinja", title=title, lead=lead, **score_sections(found))


def score_sections(found: Evaluation) -> dict[str, Any]:
    """What the sections of scores and answers show, in whatever page they stand."""
    names = list(found.results)
    tasks = {skill: {name: found.interval(name, skill).score for name in names} for skill in found.skills}
    points = borda(tasks)
    return {
        "names": names,
        "overall": [found.interval(name) for name in names],
        "points": [points[name] for name in names] if len(names) > 1 else [],
        "skills": [
            {
                "name": skill,
                "metric": found.metric(skill),
                "n": found.interval(names[0], skill).n,
                "scores": [found.interval(name, skill) for name in names],
                "choices": [found.choice_interval(name, skill) for name in names],
            }
            for skill in found.skills
        ],
        "samples": _samples(found, names),
    }


def _samples(found: Evaluation, names: list[str]) -> list[dict[str, Any]]:
    """The first items of every skill in turn, with each subject's answer."""
    per_skill = max(1, SAMPLES // len(found.skills))
    taken: dict[str, int] = {}
    lines: list[dict[str, Any]] = []
    for index, item in enumerate(found.items):
        taken[item.skill] = taken.get(item.skill, 0) + 1
        if taken[item.skill] > per_skill or len(lines) >= SAMPLES:
            continue
        answers = [(found.results[name][index].output, found.results[name][index].score) for name in names]
        lines.append(
            {"skill": item.skill, "prompt": item.row.prompt, "wanted": " / ".join(item.answers), "answers": answers}
        )
    return lines
