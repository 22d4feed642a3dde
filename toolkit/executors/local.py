"""In this process, one shard after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.protocols import RowPass, RowWorker
from xpert.records import Row
from xpert.storage import hash_json

__all__ = ["PLUGIN"]


class Local:
    """Runs passes here. The worker of the last pass stays loaded, since a bandit asks it again and again."""

    def __init__(self, *, workers: int | None = None, device: str = "auto", progress: Progress = SILENT) -> None:
        if workers is not None:
            raise BadInput(
                "executor local works in this process, without workers", hint="leave --workers out, or take ray"
            )
        self.device = device
        self._open: tuple[str, RowWorker] | None = None

    def run(
        self, row_pass: RowPass, shards: Sequence[Callable[[], Sequence[Row]]]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        name = hash_json({"name": row_pass.name, **row_pass.key})
        if self._open is None or self._open[0] != name:
            self._open = None  # the former worker's model goes before the next one comes
            self._open = (name, row_pass.open(self.device))
        worker = self._open[1]
        for index, rows in enumerate(shards):
            yield index, worker(rows())


PLUGIN = Local
