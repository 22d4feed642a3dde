"""`lsa`: TF-IDF over words and word pairs, reduced by a truncated SVD. Learns from the pool; needs no download.

Deerwester et al. 1990, "Indexing by latent semantic analysis"; the SVD is Halko, Martinsson and Tropp 2011
(arXiv:0909.4061), as in scikit-learn.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from xpert.embedding import normalise
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.protocols import EmbedderContext, Floats

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["PLUGIN", "Lsa"]

_BLOCK = 8192


@dataclass(frozen=True)
class _Settings:
    """Chosen by measurement: see benchmarks/results/embedders.md."""

    dimensions: int = 256
    words: tuple[int, int] = (1, 2)
    pattern: str = r"\w+|[^\w\s]"
    sublinear: bool = True
    min_rows: int = 2
    max_terms: int = 60_000
    passes: int = 3


class Lsa:
    """Cost on one core: about 0.4 s per thousand short rows to fit and embed. Memory: the term matrix, about 1 kB a row."""

    def __init__(self, context: EmbedderContext, settings: _Settings | None = None) -> None:
        if context.argument is not None:
            raise BadInput("the embedder lsa takes no argument", where=f"lsa:{context.argument}")
        self._settings = settings or _Settings()
        self._seed = context.seed
        self._terms: list[str] | None = None
        self._idf = np.zeros(0, np.float32)
        self._axes = np.zeros((1, 0), np.float32)

    @property
    def identity(self) -> str:
        version = importlib.metadata.version("scikit-learn")
        return f"lsa/1 sklearn={version} seed={self._seed} {self._settings}"

    def fit(self, texts: Sequence[str]) -> None:
        """Learns terms, weights and axes. The number of axes is at most the number of rows and of terms."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.utils.extmath import randomized_svd

        settings = self._settings
        # In a small pool most terms stand in one row, and dropping those would leave little or nothing.
        min_rows = settings.min_rows if len(texts) >= 1000 else 1
        vectorizer = CountVectorizer(
            ngram_range=settings.words,
            token_pattern=settings.pattern,
            min_df=min_rows,
            max_features=settings.max_terms,
            dtype=np.float32,
        )
        try:
            counts = vectorizer.fit_transform(texts)
        except ValueError as error:
            if "empty vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
                raise
            self._learn([], np.zeros(0, np.float32), np.zeros((1, 0), np.float32))
            return
        terms = vectorizer.get_feature_names_out().tolist()
        rows_with = np.bincount(counts.indices, minlength=len(terms))
        idf = (np.log((1 + len(texts)) / (1 + rows_with)) + 1).astype(np.float32)
        matrix = self._weigh(counts, idf)
        rank = min(settings.dimensions, *matrix.shape)
        _, _, axes = randomized_svd(
            matrix, rank, n_iter=settings.passes, power_iteration_normalizer="LU", random_state=self._seed
        )
        self._learn(terms, idf, np.ascontiguousarray(axes, dtype=np.float32))

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        """Texts -> [n, d]; a text without a known term gives a zero row. Raises RuntimeError before `fit`."""
        from sklearn.feature_extraction.text import CountVectorizer

        if self._terms is None:
            raise RuntimeError("lsa embeds only after fit")
        rows = np.zeros((len(texts), len(self._axes)), np.float32)
        if not self._terms:
            return rows
        vectorizer = CountVectorizer(
            ngram_range=self._settings.words,
            token_pattern=self._settings.pattern,
            vocabulary={term: index for index, term in enumerate(self._terms)},
            dtype=np.float32,
        )
        with progress.task("embedding (lsa)", total=len(texts)) as task:
            for start in range(0, len(texts), _BLOCK):
                block = texts[start : start + _BLOCK]
                matrix = self._weigh(vectorizer.transform(block), self._idf)
                rows[start : start + len(block)] = normalise(matrix @ self._axes.T)
                task.advance(len(block))
        return rows

    def state(self) -> dict[str, NDArray[Any]]:
        if self._terms is None:
            raise RuntimeError("lsa has no state before fit")
        terms = np.frombuffer("\n".join(self._terms).encode(), np.uint8)
        return {"terms": terms, "idf": self._idf, "axes": self._axes}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        joined = bytes(state["terms"]).decode()
        self._learn(joined.split("\n") if joined else [], np.asarray(state["idf"]), np.asarray(state["axes"]))

    def _learn(self, terms: list[str], idf: Floats, axes: Floats) -> None:
        self._terms, self._idf, self._axes = terms, idf, axes

    def _weigh(self, counts: csr_matrix, idf: Floats) -> csr_matrix:
        """Counts -> (1 + log count) · idf, rows of length 1."""
        from sklearn.preprocessing import normalize

        if self._settings.sublinear:
            counts.data = 1 + np.log(counts.data)
        counts.data *= idf[counts.indices]
        weighed: csr_matrix = normalize(counts, copy=False)
        return weighed


PLUGIN = Lsa
