"""`GET /v1/models`: what can be asked for, in OpenAI's form with what xpert knows of it."""

from __future__ import annotations

from typing import Any

from xpert.experts.mixture import BASE, Mixture, MixtureExpert

__all__ = ["model_list"]


def model_list(mixture: Mixture, *, created: int, embedder: str | None = None) -> list[dict[str, Any]]:
    """The mixture first, then its experts in order, the base, and the embedder."""
    whole: dict[str, Any] = {
        "kind": "mixture",
        "router": mixture.router,
        "gate": mixture.gate.name if mixture.gate else None,
        "aggregator": mixture.aggregator.name if mixture.aggregator else None,
        "calibrated": mixture.calibration is not None,
        "experts": list(mixture.keys),
    }
    rows: list[tuple[str, dict[str, Any]]] = [
        (mixture.name, whole),
        *((expert.key, _expert(expert)) for expert in mixture.experts),
        (BASE, {"kind": "base", "ref": mixture.base.ref}),
    ]
    if embedder is not None and embedder != BASE:
        rows.append((embedder, {"kind": "embedder"}))
    return [
        {"id": id, "object": "model", "created": created, "owned_by": "xpert", "xpert": about} for id, about in rows
    ]


def _expert(expert: MixtureExpert) -> dict[str, Any]:
    profile = expert.card.profile
    scores = {
        skill: {"expert": round(score.expert.score, 4), "base": round(score.base.score, 4), "metric": score.metric}
        for skill, score in (profile.skills.items() if profile else ())
    }
    return {
        "kind": "expert",
        "ref": expert.ref,
        "skills": list(expert.card.skills),
        "about": expert.card.description,
        "weight": expert.weight,
        "fingerprint": expert.fingerprint,
        "scores": scores,
    }
