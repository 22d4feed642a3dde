"""Spherical k-means over embeddings, and the terms that tell its clusters apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.embedding import normalise
from xpert.errors import BadInput
from xpert.protocols import Floats
from xpert.similarity import max_similarity

__all__ = ["Clusters", "cluster", "cluster_count", "different_rows", "telling_terms", "without_repeats"]

Labels = NDArray[np.int32]

_MOST_CLUSTERS = 4096
_SEEDING_ROWS_PER_CLUSTER = 4
_CACHED_CELLS = 1_000_000
_STAGES = ((16, 5), (48, 3), (256, 3))
"""Rows per cluster that Lloyd's iterations go over, and how many go over them."""
_NAMED_ROWS_PER_CLUSTER = 200


@dataclass(frozen=True)
class Clusters:
    """labels [n] int32 in 0..k-1, centroids [k, d] float32 of length 1, and per cluster its telling terms.

    No cluster is empty. A row's cluster is that of its nearest centroid, except for rows that were moved to fill a
    cluster that would have been empty.
    """

    labels: Labels
    centroids: Floats
    terms: list[list[str]]

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.labels, minlength=len(self)).astype(np.int64)


def cluster_count(setting: str, embeddings: Floats) -> int:
    """How many clusters `auto` or a number means for these rows [n, d].

    `auto` is round(sqrt(n / 2)), at most 4096 and at most the number of different rows. Raises BadInput for a number
    that is not in 1..n, or larger than the number of different rows.
    """
    n = len(embeddings)
    if setting == "auto":
        wanted = max(1, min(_MOST_CLUSTERS, round(math.sqrt(n / 2))))
        return min(wanted, different_rows(embeddings, wanted))
    if not re.fullmatch(r"[+-]?\d+", setting):
        raise BadInput(f"clusters is {setting!r}", hint="write a whole number, or auto")
    wanted = int(setting)
    if wanted < 1:
        raise BadInput(f"clusters is {wanted}; the least is 1", hint="write a whole number from 1, or auto")
    if wanted > n:
        raise BadInput(f"clusters is {wanted:,}, but the pool holds {n:,} rows", hint="lower --clusters, or write auto")
    different = different_rows(embeddings, wanted)
    if wanted > different:
        raise BadInput(
            f"clusters is {wanted:,}, but only {different:,} rows of the pool embed differently",
            hint=f"write at most {different}, or auto",
        )
    return wanted


def cluster(embeddings: Floats, k: int, *, seed: int = 0, rough: bool = False) -> tuple[Labels, Floats]:
    """Spherical k-means (cosine): rows [n, d] of length 1 -> labels [n] int32, centroids [k, d].

    Seeded by greedy k-means++, then Lloyd's iterations on samples that grow, each within the next: most of the way is
    gone on few rows (nested mini-batches, Newling and Fleuret 2016, arXiv:1602.02934). At most 256 rows per cluster,
    drawn by `seed`, are trained on; all rows are assigned. k must be at most the number of different rows (see
    `cluster_count`). `rough` leaves out the iterations on more than 48 rows per cluster.
    The same seed and number of BLAS threads give the same clusters.
    Time O((5 min(n, 256 k) + 250 k + n) k d).
    """
    rows = np.ascontiguousarray(embeddings, dtype=np.float32)
    if not 1 <= k <= len(rows):
        raise ValueError(f"k is {k} for {len(rows)} rows")
    if k == 1:
        return np.zeros(len(rows), np.int32), normalise(rows.mean(axis=0, keepdims=True))
    rng = np.random.default_rng(seed)
    centroids = _seeds(rows, k, rng)
    order = rng.permutation(len(rows))
    for rows_per_cluster, iterations in _STAGES[: 2 if rough else 3]:
        count = rows_per_cluster * k
        centroids = _lloyd(rows[np.sort(order[:count])] if count < len(rows) else rows, centroids, iterations)
    cosines, labels = max_similarity(rows, centroids)
    return _fill_empty(rows, labels.astype(np.int32), centroids, cosines)


def _seeds(rows: Floats, k: int, rng: np.random.Generator) -> Floats:
    """k rows to start from: each the best of some that are drawn with a chance that grows with 1 - cosine to the
    nearest one before.

    Greedy k-means++ (Arthur and Vassilvitskii 2007) on a sample of the rows: from seeds drawn evenly, k-means leaves
    small clusters joined and splits big ones. The best of 2 + log k is that which leaves the least distance to go.
    Time O(4 k^2 d log k).
    """
    sample = np.ascontiguousarray(rows[np.sort(rng.permutation(len(rows))[: max(4096, _SEEDING_ROWS_PER_CLUSTER * k)])])
    trials = 2 + int(math.log(k))
    chosen = [int(rng.integers(len(sample)))]
    distance = _distances(sample, chosen)[0]
    for _ in range(k - 1):
        chance = distance.astype(np.float64).cumsum()
        if chance[-1] <= 0:  # fewer different rows in the sample than clusters: `_fill_empty` mends the rest
            chosen.append(int(rng.integers(len(sample))))
            continue
        drawn = np.searchsorted(chance, rng.random(trials) * chance[-1], side="right")
        drawn = np.minimum(drawn, np.flatnonzero(distance)[-1])  # rounding may lead past the last row with a chance
        left = np.minimum(distance, _distances(sample, drawn))
        best = int(left.sum(axis=1, dtype=np.float64).argmin())
        distance = left[best]
        chosen.append(int(drawn[best]))
    return np.ascontiguousarray(sample[chosen])


def _distances(sample: Floats, chosen: Sequence[int] | NDArray[np.int64]) -> Floats:
    """1 - cosine [m, n] of the chosen rows with all; what is left of the distance of equal rows is rounding, thus 0."""
    distance = 1 - sample[chosen] @ sample.T
    distance[distance < 1e-6] = 0
    distance[np.arange(len(chosen)), chosen] = 0  # a zero row has no cosine even with itself
    return distance


def _nearest(rows: Floats, centroids: Floats) -> NDArray[np.int64]:
    """The centroid nearest to each row [n]; in blocks whose similarities stay in the cache."""
    labels = np.empty(len(rows), np.int64)
    step = max(64, _CACHED_CELLS // len(centroids))
    transposed = np.ascontiguousarray(centroids.T)
    for start in range(0, len(rows), step):
        labels[start : start + step] = (rows[start : start + step] @ transposed).argmax(axis=1)
    return labels


def _lloyd(rows: Floats, centroids: Floats, iterations: int) -> Floats:
    """Each centroid becomes the mean direction of the rows nearest to it; one that no row is nearest to stays."""
    from scipy.sparse import csr_matrix

    k = len(centroids)
    for _ in range(iterations):
        labels = _nearest(rows, centroids)
        member = csr_matrix((np.ones(len(rows), np.float32), labels, np.arange(len(rows) + 1)), shape=(len(rows), k))
        means = normalise(member.T @ rows)
        centroids = np.where(means.any(axis=1, keepdims=True), means, centroids)
    return centroids


def _fill_empty(rows: Floats, labels: Labels, centroids: Floats, cosines: Floats) -> tuple[Labels, Floats]:
    """Splits the biggest cluster for each empty one: its row farthest from the centroid founds the new cluster, and
    the rows nearer to that than to the old centroid go with it."""
    sizes = np.bincount(labels, minlength=len(centroids))
    for empty in np.flatnonzero(sizes == 0):
        for biggest in np.argsort(-sizes, kind="stable"):
            members = np.flatnonzero(labels == biggest)
            founder = members[cosines[members].argmin()]
            to_founder = rows[members] @ rows[founder]
            moving = members[to_founder > cosines[members]]
            if founder not in moving:  # a zero row, or rounding
                moving = np.append(moving, founder)
            if len(moving) < len(members):
                break
        else:  # cannot happen while k is at most the number of different rows
            raise RuntimeError("no cluster can be split")
        labels[moving] = empty
        centroids[empty] = normalise(rows[founder][None])[0]
        cosines[moving] = rows[moving] @ centroids[empty]
        sizes = np.bincount(labels, minlength=len(centroids))
    return labels, centroids


def different_rows(embeddings: Floats, enough: int) -> int:
    """How many different rows [n, d] there are, counted no further than `enough`."""
    seen: set[bytes] = set()
    for row in embeddings:
        seen.add((row + 0.0).tobytes())  # -0.0 is 0.0
        if len(seen) >= enough:
            break
    return len(seen)


def telling_terms(texts: Sequence[str], labels: Labels, k: int, *, count: int = 8, seed: int = 0) -> list[list[str]]:
    """Per cluster, up to `count` words and word pairs that stand in it far more than elsewhere, most telling first.

    Class-based TF-IDF: tf(t, c) · log(1 + A / f(t)), with A the mean number of terms per cluster (Grootendorst 2022,
    arXiv:2203.05794), over at most 200 rows per cluster drawn by `seed`. A term of words
    that stand in the terms before it is left out.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    picked = _sample_per_cluster(labels, k, np.random.default_rng(seed))
    vectorizer = CountVectorizer(
        ngram_range=(1, 2), stop_words=sorted(ENGLISH_STOP_WORDS), token_pattern=r"[^\W\d_]{2,}", dtype=np.float64
    )
    try:
        counts = vectorizer.fit_transform([texts[row] for row in picked])
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return [[] for _ in range(k)]
    names = vectorizer.get_feature_names_out()
    # How many rows hold a term, not how often: one row that repeats a word must not name the cluster.
    counts.data[:] = 1
    member = csr_matrix((np.ones(len(picked)), (labels[picked], np.arange(len(picked)))), shape=(k, len(picked)))
    per_cluster = (member @ counts).tocsr()
    totals = np.asarray(per_cluster.sum(axis=0)).ravel()
    weight = np.log1p(per_cluster.sum() / k / totals)
    terms = []
    for index in range(k):
        row = per_cluster[index]
        scores = row.data * weight[row.indices]
        order = np.lexsort((row.indices, -scores))
        terms.append(without_repeats((str(names[row.indices[at]]) for at in order[: count * 5]), count))
    return terms


def _sample_per_cluster(labels: Labels, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[order], np.arange(k))
    place = np.arange(len(order)) - starts[labels[order]]
    return np.sort(order[place < _NAMED_ROWS_PER_CLUSTER])


def without_repeats(ranked: Iterable[str], count: int) -> list[str]:
    """The first `count` terms that bring a word the terms before them have not."""
    kept: list[str] = []
    said: set[str] = set()
    for term in ranked:
        words = set(term.split())
        if words <= said:
            continue
        kept.append(term)
        said |= words
        if len(kept) == count:
            break
    return kept
