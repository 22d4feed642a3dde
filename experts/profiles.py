"""Profiling an expert: its scores and its base's, per skill, on one suite, written into its card and its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from xpert.experts.evaluate import EvalOptions, Evaluation, Subject, usable_items
from xpert.experts.expert_report import REPORT_FILE, write_expert_report
from xpert.experts.mixture import BASE
from xpert.experts.serving import open_engine
from xpert.experts.subjects import score_subjects
from xpert.progress import SILENT, Progress
from xpert.records import SuiteItem
from xpert.registry.card import ExpertCard, SkillProfile, SkillScore
from xpert.registry.model_card import model_card
from xpert.storage import hash_file, write_file

__all__ = ["as_profile", "profile_expert", "write_profile"]

EXPERT = "expert"
MODEL_CARD = "README.md"


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
    """Scores the expert in `folder` and its base, and writes both into its card, README and report.

    `base` is where the base model lies, if not where the card says; its weights must be those of the card.
    """
    options = options or EvalOptions()
    card = ExpertCard.read(folder)
    items = usable_items(items, options)
    lm, engine = open_engine(
        base or card.base.ref, card.base.fingerprint, device=device, max_batch=options.max_batch, progress=progress
    )
    engine.add_expert(EXPERT, folder)
    subjects = [Subject.fixed(BASE, ()), Subject.fixed(EXPERT, ((EXPERT, 1.0),))]
    found = score_subjects(lm, engine, subjects, items, options, seed=seed, progress=progress)
    profile = as_profile(found, EXPERT, BASE, suite=suite, suite_fingerprint=suite_fingerprint)
    write_profile(folder, profile, found, on_hub=lm.on_hub)
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


def write_profile(folder: Path, profile: SkillProfile, found: Evaluation, *, on_hub: bool) -> None:
    """Puts the profile into the report and the model card, and into the card last; the card's hashes follow."""
    card = dataclasses.replace(ExpertCard.read(folder), profile=profile)
    write_expert_report(folder, card, found)
    write_file(folder / MODEL_CARD, model_card(card, on_hub=on_hub))
    drawn = {name: hash_file(folder / name) for name in (MODEL_CARD, REPORT_FILE)}
    dataclasses.replace(card, files={**card.files, **drawn}).write(folder)
