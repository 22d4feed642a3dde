"""What may be set about finding gaps."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option

__all__ = ["GapOptions"]


@dataclass(frozen=True)
class GapOptions(Config):
    clusters: str = option("auto", "how many clusters of unserved prompts: a number, or auto: what parts them best")
    below: float | None = option(
        None,
        "a routed prompt counts as unserved below this chance, or below this score of its best candidate where the "
        "router was not calibrated; by default only those that fell back to the base do",
    )
    min_prompts: int = option(
        5, "a cluster of fewer different prompts is not told of: it would be about persons, not about a task", minimum=1
    )
    embedder: str = option("lsa", "what turns prompts into vectors: lsa, minilm, st:FOLDER or st:NAME")
    near: float = option(
        0.8,
        "prompts with this share of three-word runs in common count as one; 1: only the same words",
        minimum=0.5,
        maximum=1,
    )
    shots: int = option(50, "prompts that are written per gap, at most", minimum=1)
    pilots: int = option(20, "prompts that are written per expert as pilots, at most; 0: none", minimum=0)
    pilot_chance: float = option(
        0.8, "calibrated chance from which a served prompt may be a pilot", minimum=0, maximum=1
    )
