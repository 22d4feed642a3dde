"""Profiling an expert: its scores and its base's on one suite, written into its card and its report.

By declared skill, by cluster of the items, by keyword of theirs, and how evenly it does on related items.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert.experts.consistency import Probes, consistency, find_probes
from xpert.experts.evaluate import EvalOptions, Evaluation, Subject, usable_items
from xpert.experts.expert_report import REPORT_FILE, write_expert_report
from xpert.experts.item_groups import ItemGroups, ItemSpace, by_cluster
from xpert.experts.known_prompts import seen_in_training
from xpert.experts.mixture import BASE
from xpert.experts.model_keywords import check_keyword_model, keywords_by_model, open_keyword_judge
from xpert.experts.profile_options import ProfileOptions
from xpert.experts.serving import open_engine
from xpert.experts.subjects import score_subjects
from xpert.experts.term_keywords import keywords_by_terms
from xpert.progress import SILENT, Progress
from xpert.records import SuiteItem
from xpert.registry.card import ExpertCard, SkillProfile, SkillScore
from xpert.registry.model_card import model_card
from xpert.storage import hash_file, write_file

__all__ = ["Profiled", "Views", "as_profile", "profile_expert", "write_profile"]

EXPERT = "expert"
MODEL_CARD = "README.md"


@dataclass(frozen=True)
class Views:
    """What a profile shows beside the declared skills."""

    clusters: ItemGroups = field(default_factory=ItemGroups)
    keywords: ItemGroups = field(default_factory=ItemGroups)
    probes: Probes = field(default_factory=Probes)

    @property
    def how(self) -> dict[str, Any]:
        parts = {"clusters": self.clusters.how, "keywords": self.keywords.how, "probes": self.probes.how}
        return {name: dict(how) for name, how in parts.items() if how}


@dataclass(frozen=True)
class Profiled:
    """A profile, the evaluation it was made of, and sentences that whoever reads its scores should know."""

    profile: SkillProfile
    evaluation: Evaluation
    notes: tuple[str, ...] = ()


def profile_expert(
    folder: Path,
    items: Sequence[SuiteItem],
    *,
    suite: str,
    suite_fingerprint: str,
    options: EvalOptions | None = None,
    grouping: ProfileOptions | None = None,
    base: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Profiled:
    """Scores the expert in `folder` and its base, and writes both into its card, README and report.

    `base` is where the base model lies, if not where the card says; its weights must be those of the card. The base
    answers all items and then the expert, so that the time of each is its own. Clusters, terms and probes are found
    before a model is loaded; keywords of a model after the scoring, by the open base model unless another is named.
    """
    options, grouping = options or EvalOptions(), grouping or ProfileOptions()
    card = ExpertCard.read(folder)
    items = usable_items(items, options)
    seen = seen_in_training(folder, items)
    check_keyword_model(grouping.keyword_model)
    where = base or card.base.ref
    space = ItemSpace(items, grouping.embedder, base=where, seed=seed, device=device, progress=progress)
    views = _views(items, grouping, space)
    lm, engine = open_engine(
        where, card.base.fingerprint, device=device, max_batch=options.max_batch, progress=progress
    )
    engine.add_expert(EXPERT, folder)
    found, figures = _answer(lm, engine, items, options, seed=seed, progress=progress)
    if grouping.keywords == "model":
        judge = open_keyword_judge(
            grouping.keyword_model, lm, engine, device=device, max_batch=options.max_batch, progress=progress
        )
        prompts = [item.row.prompt for item in items]
        views = dataclasses.replace(views, keywords=keywords_by_model(prompts, judge, grouping.keyword_min))
    profile = as_profile(
        found, EXPERT, BASE, suite=suite, suite_fingerprint=suite_fingerprint, views=views, figures=figures
    )
    how: dict[str, Any] = {
        **profile.how,
        "answering": {"device": str(lm.device), "max_batch": options.max_batch, "max_tokens": options.max_tokens},
        "seen_in_training": len(seen),
    }
    profile = dataclasses.replace(profile, how=how)
    write_profile(folder, profile, found, on_hub=lm.on_hub)
    return Profiled(profile, found, (*_notes(card, items, seen, suite_fingerprint), *_view_notes(views, len(items))))


def as_profile(
    found: Evaluation,
    expert: str,
    base: str,
    *,
    suite: str,
    suite_fingerprint: str,
    views: Views | None = None,
    figures: Mapping[str, float] | None = None,
) -> SkillProfile:
    """One subject of an evaluation, with another as its base, as a card holds it."""
    views = views or Views()
    skills = {}
    for skill in found.skills:
        rows = [row for row, item in enumerate(found.items) if item.skill == skill]
        probes = views.probes.of_skill.get(skill, ())
        skills[skill] = dataclasses.replace(
            _score(found, expert, base, rows, skill),
            expert_choice=found.choice_interval(expert, skill),
            base_choice=found.choice_interval(base, skill),
            consistency=consistency(found, expert, probes, skill),
            base_consistency=consistency(found, base, probes, skill),
        )
    clusters, keywords = (
        {name: _score(found, expert, base, rows, name) for name, rows in groups.members.items()}
        for groups in (views.clusters, views.keywords)
    )
    return SkillProfile(suite, suite_fingerprint, skills, clusters, keywords, views.how, dict(figures or {}))


def _score(found: Evaluation, expert: str, base: str, rows: Sequence[int], name: str) -> SkillScore:
    own, other = (found.interval_over(subject, rows, name) for subject in (expert, base))
    return SkillScore(found.metric_over(rows), expert=own, base=other)


def write_profile(folder: Path, profile: SkillProfile, found: Evaluation, *, on_hub: bool) -> None:
    """Puts the profile into the report and the model card, and into the card last; the card's hashes follow."""
    card = dataclasses.replace(ExpertCard.read(folder), profile=profile)
    write_expert_report(folder, card, found)
    write_file(folder / MODEL_CARD, model_card(card, on_hub=on_hub))
    drawn = {name: hash_file(folder / name) for name in (MODEL_CARD, REPORT_FILE)}
    dataclasses.replace(card, files={**card.files, **drawn}).write(folder)


def _answer(
    lm: Any, engine: Any, items: Sequence[SuiteItem], options: EvalOptions, *, seed: int, progress: Progress
) -> tuple[Evaluation, dict[str, float]]:
    base, expert = Subject.fixed(BASE, ()), Subject.fixed(EXPERT, ((EXPERT, 1.0),))
    alone = score_subjects(lm, engine, [base], items, options, seed=seed, progress=progress)
    found = score_subjects(lm, engine, [base, expert], items, options, known=alone, seed=seed, progress=progress)
    figures = {
        "items": len(items),
        "seconds": round(alone.spent["seconds"] + found.spent["seconds"], 3),
        "tokens": int(alone.spent["tokens"] + found.spent["tokens"]),
        "seconds_per_item": round(found.spent["answer_seconds"] / len(items), 6),
    }
    return found, figures


def _views(items: Sequence[SuiteItem], grouping: ProfileOptions, space: ItemSpace) -> Views:
    """What needs no language model. Cheap beside the answers."""
    terms = ItemGroups()
    if grouping.keywords == "terms":
        terms = keywords_by_terms([item.row.prompt for item in items], grouping.keyword_min)
    probes = find_probes(items, grouping.probes, grouping.probe_threshold, space)
    return Views(by_cluster(grouping.clusters, space), terms, probes)


def _notes(card: ExpertCard, items: Sequence[SuiteItem], seen: Sequence[SuiteItem], fingerprint: str) -> list[str]:
    notes = []
    if card.profile is not None:
        same = "the same suite" if card.profile.suite_fingerprint == fingerprint else "another suite,"
        notes.append(f"this replaces the expert's earlier profile, on {same} {card.profile.suite}")
    if seen:
        notes.append(
            f"warning: {len(seen):,} of the suite's {len(items):,} items stand among the prompts that the expert was "
            f"trained on ({seen[0].row.id} for one), and may be remembered rather than solved. Leave them out of the "
            "suite, or keep the suite out of the training data by `xpert pool build --avoid SUITE` and train again"
        )
    return notes


def _view_notes(views: Views, items: int) -> list[str]:
    notes = []
    left_out: Mapping[str, int] = views.probes.how.get("left_out", {})
    if left_out:
        counts = ", ".join(f"{count:,} by {metric}" for metric, count in Counter(left_out).items())
        notes.append(f"consistency is of right and wrong answers: items scored in part are left out of it ({counts})")
    how = views.keywords.how
    unnamed = how.get("items_unnamed", 0)
    if 2 * unnamed > items:
        notes.append(
            f"warning: for {unnamed:,} of {items:,} items the model named no keyword twice; these keywords say little, "
            "and a larger --keyword-model may name better ones"
        )
    if how and not views.keywords.members:
        notes.append(f"no keyword has {how['least_items']} items; lower --keyword-min")
    return notes
