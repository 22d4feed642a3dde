"""Opening a scorer by its name and written parameters: how a selector takes another method's score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xpert import plugins
from xpert.errors import BadInput
from xpert.selectors._anchors import needs_shots

if TYPE_CHECKING:
    import numpy as np

    from xpert.features import Features
    from xpert.protocols import Scorer
    from xpert.records import Shots

__all__ = ["check_scorer", "open_scorer", "prepared_scorer", "scorer_settings"]


def open_scorer(name: str, parameters: str | Mapping[str, Any] = "") -> Scorer:
    """The scorer `name` with parameters as a mapping or as text: `mode=ppl,max-length=512`.

    A comma inside a value is written `;`. Raises BadInput for what the scorer does not know.
    """
    scorer_class = plugins.load("scorer", name)
    given = _parse(parameters, name) if isinstance(parameters, str) else dict(parameters)
    scorer: Scorer = scorer_class(scorer_class.Options.from_mapping(given, where=f"scorer {name}"))
    return scorer


def scorer_settings(name: str, parameters: str | Mapping[str, Any] = "") -> dict[str, Any]:
    """The scorer's options in full, as a manifest holds them."""
    scorer_class = plugins.load("scorer", name)
    given = _parse(parameters, name) if isinstance(parameters, str) else dict(parameters)
    settings: dict[str, Any] = scorer_class.Options.from_mapping(given, where=f"scorer {name}").to_dict()
    return settings


def check_scorer(name: str, parameters: str | Mapping[str, Any] = "") -> None:
    """Raises BadInput where `open_scorer` would: for options to be refused before any work is done."""
    open_scorer(name, parameters)


def prepared_scorer(
    name: str,
    parameters: str | Mapping[str, Any],
    features: Features,
    shots: Shots | None,
    rng: np.random.Generator,
) -> Scorer:
    """An opened scorer that is ready to score; raises BadInput where it needs shots or a base that are not given."""
    scorer = open_scorer(name, parameters)
    if "shots" in scorer.needs:
        needs_shots(name, shots, answers="answers" in scorer.needs)
    if "base" in scorer.needs:
        features.base()
    scorer.prepare(features, shots, rng)
    return scorer


def _parse(text: str, name: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"{part!r} is not KEY=VALUE", where=f"parameters of scorer {name}")
        found[key.strip()] = value.strip().replace(";", ",")
    return found
