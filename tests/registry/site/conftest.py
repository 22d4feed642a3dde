"""Experts for the pages, made without a registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.chromium import browser as browser
from tests.chromium import chromium as chromium
from xpert.registry.card import BaseModel, ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.site.data import Catalogue, Member, MixtureFacts, ShownVersion, catalogue
from xpert.registry.versions import StoredFile, Version


def interval(score: float, n: int = 40, width: float = 0.05) -> Interval:
    return Interval(score, max(0.0, score - width), min(1.0, score + width), n)


def shown(
    name: str,
    number: int = 1,
    *,
    scores: dict[str, float] | None = None,
    description: str = "",
    suite: str = "suite",
    metric: str = "exact",
    base: str = "tiny",
    tags: tuple[str, ...] = (),
    card: dict[str, Any] | None = None,
) -> ShownVersion:
    """An expert's version as the pages take it; every base score is 0.2."""
    made = {skill: SkillScore(metric, interval(score), interval(0.2)) for skill, score in (scores or {}).items()}
    settings: dict[str, Any] = {
        "base": BaseModel(base, f"{base}-fingerprint"),
        "adapter": {"rank": 4, "alpha": 8},
        "name": name,
        "description": description,
        "skills": tuple(made),
        "profile": SkillProfile(suite, f"{suite}-fingerprint", made) if made else None,
        "licences": {"MIT": 3},
    }
    document = ExpertCard(**settings | (card or {}))
    version = Version(
        *(
            name,
            number,
            "expert",
            f"{number:064x}",
            f"2026-01-{number:02d}T00:00:00Z",
            1234,
            base,
            f"{base}-fingerprint",
        ),
        description=description,
        skills=document.skills,
    )
    return ShownVersion(version, tags, (StoredFile("expert.json", 12, "a" * 64),), document)


def mixed(name: str, refs: tuple[str, ...], gate: str = "") -> ShownVersion:
    """A mixture's version as the pages take it."""
    version = Version(name, 1, "mixture", "e" * 64, "2026-02-01T00:00:00Z", 99, "tiny", "tiny-fingerprint", uses=refs)
    members = tuple(Member(ref.partition("@")[0], ref, 1.0) for ref in refs)
    return ShownVersion(version, mixture=MixtureFacts(members, "centroid", {"reject": 0.2}, gate))


@pytest.fixture
def make_shown() -> Callable[..., ShownVersion]:
    return shown


@pytest.fixture
def make_mixed() -> Callable[..., ShownVersion]:
    return mixed


@pytest.fixture
def sample() -> Catalogue:
    """Three experts, one with two versions, one without a profile, and a mixture of two."""
    return catalogue(
        [
            shown("acme/dates", 1, scores={"dates": 0.5, "sums": 0.2}),
            shown("acme/dates", 2, scores={"dates": 0.9, "sums": 0.25}, tags=("latest", "stable")),
            shown("acme/sums", 1, scores={"sums": 0.7}, description="adds numbers"),
            shown("north/new", 1, base="other"),
            mixed("acme/both", ("acme/dates@2", "acme/sums@1"), gate="arrow"),
        ],
        title="Our experts",
    )
