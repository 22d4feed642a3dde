"""Passes of a model over rows: computed once, shard by shard, and gone on with where they were stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from xpert.data import pool_from_rows
from xpert.eligible import EligibleFeatures
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.progress import Silent
from xpert.records import Row, Shots
from xpert.row_store import RowStore

SEEN: list[list[str]] = []


@dataclass(frozen=True)
class Lengths:
    """A pass that counts letters and notes what it was asked; it fails at the row `fails`."""

    fails: str | None = None
    name: ClassVar[str] = "letters"
    shard_rows: ClassVar[int] = 16

    @property
    def key(self) -> Mapping[str, Any]:
        return {"of": "answers"}

    def open(self, device: str) -> Callable[[Sequence[Row]], dict[str, Any]]:
        def work(rows: Sequence[Row]) -> dict[str, Any]:
            if self.fails in [row.id for row in rows]:
                raise RuntimeError("stopped")
            SEEN.append([row.id for row in rows])
            letters = np.array([len(row.response) for row in rows], np.float32)
            return {"letters": letters, "pair": np.stack([letters, -letters], axis=1)}

        return work


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


def test_only_rows_that_are_asked_for_are_computed_and_each_once(rows: list[Row]) -> None:
    features = Features(pool_from_rows(rows), cache=None)
    asked = np.array([7, 3, 190, 3])
    found = features.compute(Lengths(), asked)
    assert found["letters"].tolist() == [len(rows[row].response) for row in asked]
    assert found["pair"].shape == (4, 2)
    assert SEEN == [["r00003", "r00007", "r00190"]]
    features.compute(Lengths(), np.array([3, 8]))
    assert SEEN[1:] == [["r00008"]]
    assert features.computed(Lengths()) == 4


def test_a_stopped_pass_goes_on_and_ends_the_same(rows: list[Row], tmp_path: Path) -> None:
    pool, everything = pool_from_rows(rows), np.arange(200)
    with pytest.raises(RuntimeError):
        Features(pool, cache=tmp_path / "a").compute(Lengths(fails="r00100"), everything)
    done = len(SEEN)
    assert 0 < done < 13
    resumed = Features(pool, cache=tmp_path / "a").compute(Lengths(), everything)
    assert sorted(id for shard in SEEN for id in shard) == [row.id for row in rows]
    whole = Features(pool, cache=tmp_path / "b").compute(Lengths(), everything)
    assert all(resumed[name].tobytes() == whole[name].tobytes() for name in whole)
    names = [{path.name for path in (tmp_path / folder).glob("letters-*/*")} for folder in "ab"]
    assert names[0] == names[1]


def test_a_damaged_shard_is_said_to_be_so_and_computed_again(rows: list[Row], tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    pool, everything = pool_from_rows(rows), np.arange(200)
    before = Features(pool, cache=tmp_path).compute(Lengths(), everything)["letters"].tolist()
    broken = sorted(tmp_path.glob("letters-*/shard-*"))[2] / "pair.npy"
    broken.write_bytes(broken.read_bytes()[:-8])
    SEEN.clear()
    features = Features(pool, cache=tmp_path, progress=Listening())
    assert features.compute(Lengths(), everything)["letters"].tolist() == before
    assert len(SEEN) == 1
    assert "damaged" in said[0]


def test_shots_and_the_pool_without_some_rows(rows: list[Row]) -> None:
    shots = Shots(tuple(rows[:3]))
    features = Features(pool_from_rows(rows), shots=shots, cache=None)
    assert features.compute_shots(Lengths())["letters"].tolist() == [len(row.response) for row in rows[:3]]
    view = EligibleFeatures(features, np.arange(10))
    assert view.compute(Lengths(), np.array([0]))["letters"].tolist() == [len(rows[10].response)]
    with pytest.raises(BadInput, match="no shots"):
        Features(pool_from_rows(rows), cache=None).compute_shots(Lengths())


def test_a_store_refuses_what_does_not_fit(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 5)
    with pytest.raises(ValueError, match="another length"):
        store.add(np.array([1, 2]), {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="no shard holds"):
        store.read(np.array([1]))


def test_a_pass_without_a_base_and_a_wrong_executor(rows: list[Row]) -> None:
    with pytest.raises(BadInput, match="--base MODEL"):
        Features(pool_from_rows(rows), FeatureOptions()).base()
    with pytest.raises(BadInput, match=r"unknown executor 'lokal'\. Did you mean 'local'"):
        Features(pool_from_rows(rows), executor="lokal")
    with pytest.raises(BadInput, match="Leave --workers out"):
        Features(pool_from_rows(rows), workers=3)
