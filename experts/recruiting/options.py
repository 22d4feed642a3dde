"""What may be said about recruiting: the options of `xpert mix --shots` and of `recruit()`."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option

__all__ = ["DIVERSITIES", "SEARCHES", "RecruitOptions"]

DIVERSITIES = ("products", "whole", "factors")
SEARCHES = ("exact", "greedy")


@dataclass(frozen=True)
class RecruitOptions(Config):
    """Defaults are the paper's sizes, N = 4 of M = 8 (arXiv:2408.15915)."""

    max_experts: int = option(4, "with --shots: size of the group that is recruited", minimum=1)
    candidates: int = option(
        8, "with --shots: the group is sought among so many best experts, never fewer than --max-experts", minimum=1
    )
    diversity: str = option(
        "products",
        "with --shots: likeness of two experts is the cosine of their updates B A, averaged over modules (products) or "
        "of the whole (whole), or of the raw A and B as in the paper (factors)",
        choices=DIVERSITIES,
    )
    search: str = option(
        "exact", "with --shots: compare all groups, or fill one place after another (greedy)", choices=SEARCHES
    )
    beat_base: bool = option(
        True, "with --shots: leave out experts that beat the base in neither accuracy nor perplexity"
    )

    def pool_size(self, experts: int) -> int:
        """How many of `experts` can become candidates."""
        return min(experts, max(self.candidates, self.max_experts))
