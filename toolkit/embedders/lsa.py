"""`lsa`: TF-IDF over one to three words, reduced by a truncated SVD. Learns from the pool; needs no download.

Deerwester et al. 1990, "Indexing by latent semantic analysis". The SVD is that of Halko, Martinsson and Tropp 2011
(arXiv:0909.4061), as in scikit-learn. A row's coordinates are U sqrt(s) rather than U s: the strongest axes say how
ordinary a text is, and in full strength they drown what it is about (Levy, Goldberg and Dagan 2015, section 3.3).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
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
    from sklearn.feature_extraction.text import CountVectorizer

__all__ = ["PLUGIN", "Lsa", "Settings"]

_BLOCK = 8192
_SMALL_POOL = 1000
_FEWEST_DIMENSIONS = 16


@dataclass(frozen=True)
class Settings:
    """Chosen by measurement: benchmarks/results/embedders.md."""

    dimensions: int = 256
    rows_per_dimension: int = 8
    """A pool smaller than dimensions times this gets fewer (but 16): each more would be the mark of a few rows."""
    words: tuple[int, int] = (1, 3)
    pattern: str = r"\w+|[^\w\s]"
    min_rows: int = 2
    max_terms: int = 60_000
    passes: int = 3
    power: float = 0.5
    """Coordinates are U s**power."""


class Lsa:
    """Cost on one core: 0.4 s per thousand short rows to fit and embed. Memory: the term matrix, about 1 kB a row, and
    1 kB per term."""

    def __init__(self, context: EmbedderContext, settings: Settings | None = None) -> None:
        if context.argument is not None:
            raise BadInput("the embedder lsa takes no argument", where=f"lsa:{context.argument}", hint="write lsa")
        self._settings = settings or Settings()
        self._seed = context.seed
        self._terms: list[str] | None = None
        self._idf = np.zeros(0, np.float32)
        self._coordinates = np.zeros((0, 1), np.float32)
        """[terms, d]: row by row what a term adds to a text, so that a product with a few texts copies nothing."""
        self._reader: CountVectorizer | None = None

    @property
    def identity(self) -> str:
        version = importlib.metadata.version("scikit-learn")
        return f"lsa/2 sklearn={version} seed={self._seed} {self._settings}"

    def fit(self, texts: Sequence[str]) -> None:
        """Learns terms, weights and axes. There are fewer axes where rows or terms are few."""
        self.fit_embed(texts)

    def fit_embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        from sklearn.feature_extraction.text import CountVectorizer

        self._reader = None
        settings = self._settings
        vectorizer = CountVectorizer(
            ngram_range=settings.words,
            token_pattern=settings.pattern,
            # In a small pool most terms stand in one row, and dropping those would leave little or nothing.
            min_df=settings.min_rows if len(texts) >= _SMALL_POOL else 1,
            max_features=settings.max_terms,
            dtype=np.float32,
        )
        try:
            counts = vectorizer.fit_transform(_watched(texts, progress, "reading terms"))
        except ValueError as error:
            if "empty vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
                raise
            self._terms = []
            return np.zeros((len(texts), self._coordinates.shape[1]), np.float32)
        counts.sort_indices()  # as `transform` has them, so that both sum in one order and agree to the bit
        self._terms = vectorizer.get_feature_names_out().tolist()
        rows_with = np.bincount(counts.indices, minlength=len(self._terms))
        self._idf = (np.log((1 + len(texts)) / (1 + rows_with)) + 1).astype(np.float32)
        matrix = self._weigh(counts)
        progress.say(f"reducing {matrix.shape[1]:,} terms to {self._rank(*matrix.shape)} dimensions")
        self._coordinates = self._main_axes(matrix)
        return normalise(matrix @ self._coordinates)

    def _rank(self, rows: int, terms: int) -> int:
        fit = max(_FEWEST_DIMENSIONS, rows // self._settings.rows_per_dimension)
        return min(self._settings.dimensions, fit, rows, terms)

    def _main_axes(self, matrix: csr_matrix) -> Floats:
        """[terms, d]: the right singular vectors, scaled so that `matrix @ axes` is U s**power."""
        from sklearn.utils.extmath import randomized_svd

        rank = self._rank(*matrix.shape)
        _, strengths, axes = randomized_svd(
            matrix, rank, n_iter=self._settings.passes, power_iteration_normalizer="LU", random_state=self._seed
        )
        # Axes of no strength are rounding, and a negative power of it would be large.
        real = strengths > 1e-4 * strengths[0]
        scaled = axes[real] * (strengths[real] ** (self._settings.power - 1))[:, None]
        return np.ascontiguousarray(scaled.T, dtype=np.float32)

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        """Texts -> [n, d]; a text without a known term gives a zero row. Raises RuntimeError before `fit`."""
        if self._terms is None:
            raise RuntimeError("lsa embeds only after fit")
        rows = np.zeros((len(texts), self._coordinates.shape[1]), np.float32)
        if not self._terms:
            return rows
        reader = self._opened_reader(self._terms)
        with progress.task("embedding (lsa)", total=len(texts)) as task:
            for start in range(0, len(texts), _BLOCK):
                block = texts[start : start + _BLOCK]
                matrix = self._weigh(reader.transform(block))
                rows[start : start + len(block)] = normalise(matrix @ self._coordinates)
                task.advance(len(block))
        return rows

    def _opened_reader(self, terms: Sequence[str]) -> CountVectorizer:
        """Texts -> counts of the terms. Kept: looking 60,000 terms through takes longer than embedding a text."""
        from sklearn.feature_extraction.text import CountVectorizer

        if self._reader is None:
            self._reader = CountVectorizer(
                ngram_range=self._settings.words,
                token_pattern=self._settings.pattern,
                vocabulary={term: index for index, term in enumerate(terms)},
                dtype=np.float32,
            )
        return self._reader

    def state(self) -> dict[str, NDArray[Any]]:
        if self._terms is None:
            raise RuntimeError("lsa has no state before fit")
        terms = np.frombuffer("\n".join(self._terms).encode(), np.uint8)
        return {"terms": terms, "idf": self._idf, "axes": np.ascontiguousarray(self._coordinates.T)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        joined = bytes(state["terms"]).decode()
        self._terms = joined.split("\n") if joined else []
        self._idf, self._coordinates = np.asarray(state["idf"]), np.ascontiguousarray(np.asarray(state["axes"]).T)
        self._reader = None

    def _weigh(self, counts: csr_matrix) -> csr_matrix:
        """Counts -> (1 + log count) · idf, rows of length 1."""
        from sklearn.preprocessing import normalize

        counts.data = (1 + np.log(counts.data)) * self._idf[counts.indices]
        weighed: csr_matrix = normalize(counts, copy=False)
        return weighed


def _watched(texts: Sequence[str], progress: Progress, title: str) -> Iterator[str]:
    with progress.task(title, total=len(texts)) as task:
        for text in texts:
            yield text
            task.advance()


PLUGIN = Lsa
