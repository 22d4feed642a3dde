"""How evenly an expert does on items that ask for one thing in several ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xpert.experts.evaluate import Evaluation, bootstrap
from xpert.experts.item_groups import ItemSpace
from xpert.experts.metrics import RIGHT_OR_WRONG
from xpert.protocols import Floats
from xpert.records import SuiteItem
from xpert.registry.card import Consistency

__all__ = ["Probes", "agreement", "consistency", "find_probes"]


@dataclass(frozen=True)
class Probes:
    """Per skill its clusters of related items, as places in the suite; each has two at least."""

    of_skill: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


def find_probes(items: Sequence[SuiteItem], way: str, threshold: float, space: ItemSpace) -> Probes:
    """Which items are related: `field` goes by their `probe`; `auto` does so where the suite names any, and else takes
    items of a skill that are near one another; `none` finds none.

    Items whose metric gives more than right and wrong have no part in it; `how` counts them by metric. Near means: in
    the suite's order, an item joins the first earlier item that founded a cluster and has at least `threshold` as its
    cosine, or founds one. Time O(n c d) for c clusters of a skill.
    """
    if way == "none":
        return Probes()
    named = any(item.probe for item in items)
    if way == "field" and not named:
        return Probes()
    usable = [row for row, item in enumerate(items) if item.metric in RIGHT_OR_WRONG]
    left_out = Counter(item.metric for item in items if item.metric not in RIGHT_OR_WRONG)
    how: dict[str, Any] = {"by": "the suite's probe"}
    if named:
        keys = [(items[row].skill, items[row].probe or row) for row in usable]
    else:
        how = {"by": "near items of a skill", "embedder": space.identity, "threshold": threshold}
        keys = _near(items, usable, space.embeddings(), threshold)
    clusters: dict[tuple[str, str | int], list[int]] = {}
    for row, key in zip(usable, keys, strict=True):
        clusters.setdefault(key, []).append(row)
    found: dict[str, list[tuple[int, ...]]] = {}
    for (skill, _), rows in clusters.items():
        if len(rows) > 1:
            found.setdefault(skill, []).append(tuple(rows))
    how["left_out"] = dict(sorted(left_out.items()))
    how["alone"] = len(usable) - sum(len(rows) for groups in found.values() for rows in groups)
    return Probes({skill: tuple(groups) for skill, groups in sorted(found.items())}, how)


def _near(
    items: Sequence[SuiteItem], usable: Sequence[int], embeddings: Floats, threshold: float
) -> list[tuple[str, str | int]]:
    founders: dict[str, list[int]] = {}
    keys: list[tuple[str, str | int]] = []
    for row in usable:
        earlier = founders.setdefault(items[row].skill, [])
        cosines = np.round(embeddings[earlier] @ embeddings[row], 6) if earlier else np.zeros(0, np.float32)
        near = np.flatnonzero(cosines >= threshold)
        if len(near):
            keys.append((items[row].skill, earlier[int(near[0])]))
        else:
            earlier.append(row)
            keys.append((items[row].skill, row))
    return keys


def consistency(found: Evaluation, subject: str, clusters: Sequence[Sequence[int]], name: str) -> Consistency | None:
    """All right, and in agreement: means over clusters, with 95 % bootstrap intervals over clusters (2,000 resamples,
    seeded by `name`, the same for every subject). None without clusters."""
    if not clusters:
        return None
    results = found.results[subject]
    right = [sum(results[row].score == 1 for row in rows) for rows in clusters]
    sizes = [len(rows) for rows in clusters]
    seed = found.seed_of(name)
    return Consistency(
        all_right=bootstrap([float(r == size) for r, size in zip(right, sizes, strict=True)], seed),
        agreement=bootstrap([agreement(r, size) for r, size in zip(right, sizes, strict=True)], seed),
    )


def agreement(right: int, size: int) -> float:
    """The chance that two of `size` items, drawn without replacement, are both among the `right` ones, or neither is:
    (r (r - 1) + w (w - 1)) / (m (m - 1))."""
    wrong = size - right
    return (right * (right - 1) + wrong * (wrong - 1)) / (size * (size - 1))
