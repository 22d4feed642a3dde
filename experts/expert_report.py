"""The report of an expert: the course of its training and, once it is profiled, its scores and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpert.experts.evaluate import Evaluation
from xpert.experts.score_report import score_sections
from xpert.registry.card import ExpertCard, SkillProfile, SkillScore
from xpert.report.page import line_chart, write_page

__all__ = ["LOG_FILE", "REPORT_FILE", "write_expert_report"]

LOG_FILE = "training.jsonl"
REPORT_FILE = "report.html"


def write_expert_report(folder: Path, card: ExpertCard, found: Evaluation | None = None) -> None:
    """Writes `report.html` into an expert folder, from its card, its training log (if it has one), and `found`, the
    evaluation of the expert and its base."""
    log = folder / LOG_FILE
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "validation_loss" in record]
    losses = [
        ("training", "var(--chosen)", [r["step"] for r in steps], [r["loss"] for r in steps]),
        ("held-out shots", "var(--shot)", [r["step"] for r in checks], [r["validation_loss"] for r in checks]),
    ]
    rates = [("learning rate", "var(--chosen)", [r["step"] for r in steps], [r["learning_rate"] for r in steps])]
    write_page(
        folder / REPORT_FILE,
        "expert.html.jinja",
        title=card.name or folder.name,
        lead=f"{card.description} Base: {Path(card.base.ref).name}.",
        figures=card.training.get("figures", {}),
        loss_chart=line_chart(losses, unit="loss per answer token, by step"),
        rate_chart=line_chart(rates, unit="learning rate, by step"),
        options=card.training.get("options", {}),
        card=card,
        suite=card.profile.suite if card.profile else "",
        scored=found is not None,
        profile=card.profile,
        **(_views(card.profile) if card.profile else {}),
        **(score_sections(found) if found else {}),
    )


def _views(profile: SkillProfile) -> dict[str, Any]:
    """What is shown beside the scores by skill; largest groups first, whatever order the card keeps."""

    def ranked(scores: Mapping[str, SkillScore]) -> list[tuple[str, SkillScore]]:
        return sorted(scores.items(), key=lambda entry: (-entry[1].expert.n, entry[0]))

    return {
        "consistent": [
            (name, score) for name, score in profile.skills.items() if score.consistency and score.base_consistency
        ],
        "clusters": ranked(profile.clusters),
        "keywords": ranked(profile.keywords),
    }
