"""Mixture files that are wrong: refused with the reason; and ten thousand experts, which are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.experts.mixture import MixtureExpert, assemble
from xpert.experts.mixture_file import load_mixture
from xpert.registry.card import BaseModel, ExpertCard

NAN, INFINITE = float("nan"), float("inf")


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["experts"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda v: v["experts"].append(v["experts"][0]), BadInput, "two experts of the mixture are called 'casing'"),
        (first(weight=NAN), BadInput, "expert 'casing' has the weight nan; it must be above 0"),
        (first(weight=INFINITE), BadInput, "has the weight inf"),
        (first(weight=0), BadInput, "has the weight 0.0"),
        (first(weight=-1), BadInput, "has the weight -1.0"),
        (first(weight="much"), Corrupt, "the mixture is damaged"),
        (first(ref="./gone"), NotFound, "gone"),
        (first(fingerprint="0" * 64), Corrupt, "'casing' is not the one that was mixed"),
        (lambda v: v["base"].update(fingerprint="0" * 64), BadInput, "belongs to base"),
        (lambda v: v.update(router="centroids"), NotFound, "unknown router 'centroids'.*centroid"),
        (
            lambda v: v["experts"].extend({**v["experts"][0], "key": f"e{i}", "ref": f"./e{i}"} for i in range(10_000)),
            NotFound,
            "e0",
        ),
    ],
)
def test_a_bad_mixture_file(
    mixture_file: Callable[..., Path],
    change: Callable[[dict[str, Any]], object],
    kind: type[XpertError],
    message: str,
) -> None:
    path = mixture_file()
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(kind, match=message) as caught:
        load_mixture(path)
    assert type(caught.value) is kind


def test_ten_thousand_experts_are_a_mixture_like_any_other(tmp_path: Path) -> None:
    """Assembling reads their cards alone."""
    ExpertCard(base=BaseModel("base", "f" * 64), adapter={}).write(tmp_path)
    experts = [MixtureExpert(f"e{index}", str(tmp_path), "0" * 64, tmp_path) for index in range(10_000)]
    assert len(assemble(experts, router="centroid").keys) == 10_000
