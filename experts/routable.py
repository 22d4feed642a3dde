"""What routers may know of an expert, read from its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from xpert.errors import Corrupt
from xpert.experts.prototype_file import read_prototypes
from xpert.protocols import RoutableExpert
from xpert.registry.card import EXEMPLARS_FILE, ExpertCard, SkillProfile
from xpert.registry.tensor_header import read_tensor_header

__all__ = ["keyword_votes", "routable_expert"]

WEIGHTS_FILE = "adapter_model.safetensors"


def routable_expert(key: str, folder: Path, card: ExpertCard) -> RoutableExpert:
    """Of the training rows only those of the expert's own skills stand for it. Raises Corrupt for damaged files."""
    lines = _read_exemplars(folder / EXEMPLARS_FILE)
    shot_skills = {str(line["skill"]) for line in lines if line.get("kind") == "shot" and line.get("skill")}
    own = set(card.skills) or shot_skills
    kept = [
        line for line in lines if line.get("kind") == "shot" or not own or not line.get("skill") or line["skill"] in own
    ]
    kept.sort(key=lambda line: line.get("kind") == "pilot")  # the last, as `pilots` counts them
    profile = card.profile
    return RoutableExpert(
        key=key,
        exemplars=tuple(line["prompt"] for line in kept),
        skills=tuple(sorted(own)),
        skill_scores={s: score.expert.score for s, score in profile.skills.items()} if profile else {},
        exemplar_skills=tuple(line.get("skill") or "" for line in kept),
        description=card.description,
        keyword_votes=keyword_votes(profile) if profile else {},
        prototypes={part.embedder: (part.labels, read_prototypes(folder, part)) for part in card.prototypes},
        costs=_costs(folder / WEIGHTS_FILE, profile),
        pilots=sum(line.get("kind") == "pilot" for line in kept),
    )


def keyword_votes(profile: SkillProfile) -> dict[str, tuple[float, float]]:
    """keyword -> (right, wrong) of the expert. Symbolic-MoE's profile of a keyword is right - wrong.

    The two add up to the keyword's items. They are whole numbers where the metric gives right or wrong; where it gives
    credit in part, an item counts as right by its score and as wrong by the rest.
    """
    votes = {}
    for keyword, score in profile.keywords.items():
        n = score.expert.n
        right = round(score.expert.score * n, 9)  # the mean of n whole numbers, times n, but for rounding
        votes[keyword] = (right, round(n - right, 9))
    return votes


def _costs(weights: Path, profile: SkillProfile | None) -> dict[str, float]:
    """Of the adapter: its parameters and bytes, by its header alone; and the seconds per item of its profile."""
    costs: dict[str, float] = {}
    if weights.is_file():
        entries = read_tensor_header(weights)
        costs["parameters"] = float(sum(math.prod(entry.shape) for entry in entries.values()))
        costs["bytes"] = float(sum(entry.end - entry.start for entry in entries.values()))
    if profile is not None and profile.figures.get("seconds_per_item"):
        costs["seconds"] = float(profile.figures["seconds_per_item"])
    return costs


def _read_exemplars(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if not isinstance(line["prompt"], str):
                raise TypeError("prompt is not text")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Corrupt(f"line {number} is no exemplar: {error!r}", where=str(path)) from None
        lines.append(line)
    return lines
