"""A real Ray on this machine: the same results, also after a worker was killed; errors as in process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from xpert.answer_losses import AnswerLosses
from xpert.data import pool_from_rows
from xpert.errors import BadInput, Unavailable
from xpert.features import FeatureOptions, Features
from xpert.progress import Silent
from xpert.records import Row

ray = pytest.importorskip("ray")


@dataclass(frozen=True)
class Mortal:
    """A pass whose worker kills itself at row r00040: the first time, or always."""

    marks: str
    always: bool = False
    refused: str | None = None
    name: ClassVar[str] = "mortal"
    shard_rows: ClassVar[int] = 16

    @property
    def key(self) -> Mapping[str, Any]:
        return {"always": self.always}

    def open(self, device: str) -> Callable[[Sequence[Row]], dict[str, Any]]:
        def work(rows: Sequence[Row]) -> dict[str, Any]:
            for row in rows:
                mark = Path(self.marks) / row.id
                if row.id == "r00040" and (self.always or not mark.exists()):
                    mark.touch()
                    os._exit(1)
                if row.id == self.refused:
                    raise BadInput("the loss is not a number", where=row.id, hint="leave it out")
            return {"letters": np.array([len(row.response) for row in rows])}

        return work


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    # The workers cannot import this module: what it defines travels by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def features(rows: list[Row], **more: Any) -> Features:
    return Features(pool_from_rows(rows), cache=None, device="cpu", executor="ray", workers=2, **more)


def test_losses_are_those_of_this_process(rows: list[Row], tiny_base: Path) -> None:
    row_pass, everything = AnswerLosses(str(tiny_base)), np.arange(200)
    options = FeatureOptions(base=str(tiny_base))
    far = features(rows * 2, options=options).compute(row_pass, np.arange(400))
    near = Features(pool_from_rows(rows), options, cache=None, device="cpu").compute(row_pass, everything)
    np.testing.assert_allclose(far["nll"][:200], near["nll"], rtol=1e-5)
    assert far["tokens"][200:].tolist() == near["tokens"].tolist()


def test_a_killed_worker_s_shard_is_done_again(rows: list[Row], tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    found = features(rows, progress=Listening()).compute(Mortal(str(tmp_path)), np.arange(200))
    assert found["letters"].tolist() == [len(row.response) for row in rows]
    assert (tmp_path / "r00040").exists()
    assert said == ["a Ray worker died; its shard is done again by a new one"]


def test_a_shard_that_always_kills_is_given_up_and_the_others_are_kept(rows: list[Row], tmp_path: Path) -> None:
    deadly = Mortal(str(tmp_path), always=True)
    kept = features(rows)
    with pytest.raises(Unavailable, match="died 3 times"):
        kept.compute(deadly, np.arange(200))
    assert kept.computed(deadly) > 0


def test_the_user_s_errors_come_through(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"r00100: the loss is not a number\. Leave it out"):
        features(rows[90:]).compute(Mortal(str(tmp_path), refused="r00100"), np.arange(50))
    with pytest.raises(BadInput, match="the least is 1"):
        Features(pool_from_rows(rows), executor="ray", workers=0)


def test_a_cluster_that_is_not_there(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"the Ray cluster at 127\.0\.0\.1:1 cannot be reached"):
        features(rows).compute(Mortal(str(tmp_path)), np.arange(20))
