"""Features with the default embedder: what they promise, and that the cache changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xpert.features import Features
from xpert.records import Message, Row, Shots
from xpert.storage import hash_texts


class MemoryPool:
    """The part of a pool that features read."""

    path = None

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @property
    def fingerprint(self) -> str:
        return hash_texts(text for row in self.rows for text in (row.prompt, row.response))

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self) -> list[str]:
        return [row.prompt for row in self.rows]

    def responses(self) -> list[str]:
        return [row.response for row in self.rows]


def texts_pool(*prompts: str) -> MemoryPool:
    return MemoryPool([Row(str(i), (Message("user", p),), f"answer {i}") for i, p in enumerate(prompts)])


def test_rows_are_normalised_and_follow_the_pool(rows: list[Row]) -> None:
    features = Features(MemoryPool(rows), shots=Shots(tuple(rows[:4])))
    embeddings = features.embeddings()
    assert embeddings.dtype == np.float32 and len(embeddings) == len(rows)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(features.shot_embeddings(), embeddings[:4], atol=1e-5)


def test_neighbours_share_the_skill(rows: list[Row]) -> None:
    embeddings = Features(MemoryPool(rows)).embeddings()
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -1)
    nearest = cosines.argmax(axis=1)
    assert np.mean([rows[i].skill == rows[j].skill for i, j in enumerate(nearest)]) > 0.9
