"""Profiling an expert: its scores and its base's, per skill, on one suite, written into its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xpert.experts.evaluate import EvalOptions, Evaluation, Subject, usable_items
from xpert.experts.expert_folder import model_card
from xpert.experts.mixture import BASE
from xpert.experts.subjects import loaded_engine, score_subjects
from xpert.progress import SILENT, Progress
from xpert.records import SuiteItem
from xpert.registry.card import ExpertCard, SkillProfile, SkillScore
from xpert.report.page import write_page
from xpert.storage import hash_file, write_file

__all__ = ["as_profile", "profile_expert", "write_profile", "write_score_report"]

EXPERT = "expert"
REPORT_FILE = "profile.html"
MODEL_CARD = "README.md"
SAMPLES = 24


def profile_expert(
    folder: Path,
    items: list[SuiteItem],
    *,
    suite: str,
    suite_fingerprint: str,
    options: EvalOptions | None = None,
    base: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[SkillProfile, Evaluation]:
    """Scores the expert in `folder` and its base, and writes both into its card, README and `profile.html`.

    `base` is where the base model lies, if not where the card says; its weights must be those of the card.
    """
    options = options or EvalOptions()
    card = ExpertCard.read(folder)
    items = usable_items(items, options)
    with loaded_engine(
        base or card.base.ref,
        fingerprint=card.base.fingerprint,
        device=device,
        max_batch=options.max_batch,
        progress=progress,
    ) as (lm, engine):
        engine.add_expert(EXPERT, folder)
        subjects = [Subject.fixed(BASE, ()), Subject.fixed(EXPERT, ((EXPERT, 1.0),))]
        found = score_subjects(lm, engine, subjects, items, options, seed=seed, progress=progress)
    profile = as_profile(found, EXPERT, BASE, suite=suite, suite_fingerprint=suite_fingerprint)
    write_score_report(
        folder / REPORT_FILE, found, title=f"Skills of {card.name or folder.name}", lead=f"on the suite {suite}"
    )
    write_profile(folder, profile, on_hub=lm.on_hub)
    return profile, found


def as_profile(found: Evaluation, expert: str, base: str, *, suite: str, suite_fingerprint: str) -> SkillProfile:
    """One subject of an evaluation, with another as its base, as a card holds it."""
    return SkillProfile(
        suite,
        suite_fingerprint,
        {
            skill: SkillScore(
                metric=found.metric(skill),
                expert=found.interval(expert, skill),
                base=found.interval(base, skill),
                expert_choice=found.choice_interval(expert, skill),
                base_choice=found.choice_interval(base, skill),
            )
            for skill in found.skills
        },
    )


def write_profile(folder: Path, profile: SkillProfile, *, on_hub: bool) -> None:
    """Puts the profile into the card, last, and into the model card that is made of it; the card's hashes follow."""
    card = dataclasses.replace(ExpertCard.read(folder), profile=profile)
    write_file(folder / MODEL_CARD, model_card(card, on_hub=on_hub))
    drawn = {name: hash_file(folder / name) for name in (MODEL_CARD, REPORT_FILE) if (folder / name).is_file()}
    dataclasses.replace(card, files={**card.files, **drawn}).write(folder)


def write_score_report(path: Path, found: Evaluation, *, title: str, lead: str) -> None:
    """One self-contained page: scores per skill with intervals, and answers side by side."""
    names = list(found.results)
    write_page(
        path,
        "scores.html.jinja",
        title=title,
        lead=f"{len(found.items):,} items, {lead}. Brackets are 95 % bootstrap intervals.",
        names=names,
        overall=[found.interval(name) for name in names],
        skills=[
            {
                "name": skill,
                "metric": found.metric(skill),
                "n": found.interval(names[0], skill).n,
                "scores": [found.interval(name, skill) for name in names],
                "choices": [found.choice_interval(name, skill) for name in names],
            }
            for skill in found.skills
        ],
        samples=_samples(found, names),
    )


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
