"""Items of a suite in groups: clusters of their prompts, and groups by any names they were given."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert.clustering import different_rows
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.protocols import Floats
from xpert.records import SuiteItem

if TYPE_CHECKING:
    from xpert.features import Features

__all__ = ["MOST_KEYWORDS", "ItemGroups", "ItemSpace", "by_cluster", "by_names", "cluster_names", "of_keywords"]

LEAST_PER_CLUSTER = 10
"""`auto` makes clusters of this many items on average, or none: on fewer, an interval says next to nothing."""

LONGEST_NAME = 120
MOST_KEYWORDS = 1000


@dataclass(frozen=True)
class ItemGroups:
    """Places of items by the name of their group, largest group first; an item may be in several, or in none."""

    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


class ItemSpace:
    """The items' prompts in an embedder's space; nothing is computed before it is asked for.

    Cost: that of the embedder (lsa on one core: about a second and 0.4 s per thousand short prompts), once a suite: the
    features are cached.
    """

    def __init__(
        self,
        items: Sequence[SuiteItem],
        embedder: str,
        *,
        base: str | None = None,
        seed: int = 0,
        device: str = "auto",
        progress: Progress = SILENT,
    ) -> None:
        self.items, self.embedder = items, embedder
        self._settings: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
        self._base = base if embedder == "lm" else None
        self.seed, self.device, self.progress = seed, device, progress

    def embeddings(self) -> Floats:
        """float32 [n, d], rows of length 1."""
        return self._features.embeddings()

    @property
    def identity(self) -> str:
        return str(self._features.describe()["embedder_identity"])

    def features(self, clusters: str) -> Features:
        from xpert.features import FeatureOptions, Features
        from xpert.pool import pool_from_rows

        options = FeatureOptions(embedder=self.embedder, clusters=clusters, base=self._base)
        return Features(pool_from_rows([item.row for item in self.items]), options, **self._settings)

    @cached_property
    def _features(self) -> Features:
        return self.features("auto")


def by_cluster(setting: str, space: ItemSpace) -> ItemGroups:
    """Groups by cluster: `none`, `auto` or a number of clusters of the items' own prompts, or the folder of clusters of
    a pool, whose nearest centroid an item belongs to.

    Names are the clusters' telling terms. `auto` is round(sqrt(n / 2)), at most n / 10, and none below 20 items.
    Raises BadInput for a number that does not fit, NotFound for a folder that is none.
    """
    if setting == "none":
        return ItemGroups()
    if setting == "auto" or re.fullmatch(r"[+-]?\d+", setting):
        return _own_clusters(setting, space)
    return _pool_clusters(Path(setting), space)


def _own_clusters(setting: str, space: ItemSpace) -> ItemGroups:
    n = len(space.items)
    count = min(round(math.sqrt(n / 2)), n // LEAST_PER_CLUSTER) if setting == "auto" else int(setting)
    if setting == "auto" and count < 2:
        space.progress.say(f"no clusters: {n} items do not make two of {LEAST_PER_CLUSTER}; --clusters N makes some")
        return ItemGroups()
    if not 1 <= count <= n:
        raise BadInput(f"clusters is {count}, but the suite has {n} items", hint=f"write 1 to {n}, or auto")
    different = different_rows(space.embeddings(), count)
    if different < count and setting != "auto":
        raise BadInput(
            f"clusters is {count}, but only {different} prompts of the suite embed differently",
            hint=f"write at most {different}, or auto",
        )
    clusters = space.features(str(different)).clusters()
    how = {"by": "k-means of the suite's prompts", "embedder": space.identity, "seed": space.seed}
    return _groups(clusters.labels.tolist(), clusters.terms, how)


def _pool_clusters(folder: Path, space: ItemSpace) -> ItemGroups:
    from xpert.cluster_folder import embed_like, read_clusters
    from xpert.similarity import max_similarity
    from xpert.storage import hash_json

    found = read_clusters(folder)
    embedded = embed_like(found, [item.row for item in space.items], device=space.device, progress=space.progress)
    _, nearest = max_similarity(embedded, found.clusters.centroids)
    labels = np.where(embedded.any(axis=1), nearest, -1).tolist()
    how = {
        "by": "nearest centroid of a pool's clusters",
        "embedder": found.manifest["figures"]["embedder"],
        "pool": found.manifest["inputs"]["pool"],
        "centroids": hash_json(found.clusters.centroids.tolist()),
        "items_without": labels.count(-1),
    }
    return _groups(labels, found.clusters.terms, how)


def _groups(labels: Sequence[int], terms: Sequence[Sequence[str]], how: dict[str, Any]) -> ItemGroups:
    names = cluster_names(terms)
    found = by_names([(names[label],) if label >= 0 else () for label in labels])
    return ItemGroups(found, {**how, "clusters": len(terms)})


def cluster_names(terms: Sequence[Sequence[str]]) -> list[str]:
    """Three telling terms each; a cluster without any, or with the terms of another, has its number as well."""
    names: list[str] = []
    for number, own in enumerate(terms):
        name = ", ".join(own[:3])[:LONGEST_NAME] or f"cluster {number}"
        names.append(f"{name} ({number})" if name in names else name)
    return names


def by_names(names: Sequence[Sequence[str]], least: int = 1) -> dict[str, tuple[int, ...]]:
    """Names of each item -> items of each name, where they are `least` at least; the largest first, then by name."""
    places: dict[str, list[int]] = {}
    for row, own in enumerate(names):
        for name in dict.fromkeys(own):
            places.setdefault(name, []).append(row)
    kept = {name: tuple(rows) for name, rows in places.items() if len(rows) >= least}
    return dict(sorted(kept.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def of_keywords(
    found: Mapping[str, tuple[int, ...]], how: Mapping[str, Any], *, items: int, smaller: int = 0
) -> ItemGroups:
    """Groups by keyword, at most 1,000 of them, since a card is to be read; `how` counts what that leaves out
    (`smaller_left_out`, with `smaller` that went before) and the items that are in no group (`items_without`)."""
    kept = dict(list(found.items())[:MOST_KEYWORDS])
    without = items - len({row for rows in kept.values() for row in rows})
    return ItemGroups(kept, {**how, "smaller_left_out": smaller + len(found) - len(kept), "items_without": without})
