"""The pool: candidate rows in one normal form, memory-mapped, named by a hash of their content.

A pool folder holds `manifest.json`, `rows/` (Arrow, which `datasets.load_from_disk` reads too) and `rejected.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from xpert.boilerplate import Boilerplate
from xpert.errors import Corrupt
from xpert.records import Message, Row
from xpert.source_files import encode
from xpert.storage import disk_errors, read_json, read_manifest, write_json

__all__ = ["POOL_SCHEMA", "Column", "Pool", "RowsWriter", "pool_from_rows", "turns_json"]

POOL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.large_string()),
        ("response", pa.large_string()),
        ("messages", pa.large_string()),  # JSON list of turns, unless they are one single user message
        ("skill", pa.string()),
        ("row", pa.large_string()),  # the row as its source wrote it, JSON
    ]
)
ROWS_FILE = "data-00000-of-00001.arrow"


class Column(Sequence[Any]):
    """One column of a pool as a sequence; values become Python objects only when they are asked for."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.arrow = values

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.arrow.take(np.arange(len(self))[index]).to_pylist()
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.arrow[int(index) % len(self)].as_py()

    def __iter__(self) -> Iterator[Any]:
        for chunk in self.arrow.chunks:
            for start in range(0, len(chunk), 4096):
                yield from chunk.slice(start, 4096).to_pylist()


class Pool:
    """Candidate rows. `path` is None for a pool in memory; indices are row numbers from 0."""

    def __init__(self, table: pa.Table, *, path: Path | None = None, fingerprint: str | None = None) -> None:
        self.table = table
        self.path = path
        if fingerprint is not None:
            self.__dict__["fingerprint"] = fingerprint

    @classmethod
    def open(cls, folder: str | Path) -> Pool:
        """A pool folder, memory-mapped. Raises BadInput where it is none, Corrupt where it is damaged."""
        folder = Path(folder)
        manifest = read_manifest(folder, "pool")
        path = folder / "rows" / ROWS_FILE
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise Corrupt(f"the rows cannot be read ({error})", where=str(path), hint="build the pool again") from None
        figures = manifest.get("figures", {})
        if table.schema != POOL_SCHEMA or table.num_rows != figures.get("rows") or "fingerprint" not in figures:
            raise Corrupt("rows and manifest do not agree", where=str(folder), hint="build the pool again")
        return cls(table, path=folder, fingerprint=figures["fingerprint"])

    @property
    def sources(self) -> list[str]:
        """Names of what it was built of (`hf:owner/name`, or a file's name without its path); none in memory."""
        if self.path is None:
            return []
        inputs = read_manifest(self.path, "pool").get("inputs", {})
        return [str(source["name"]) for source in inputs.get("sources", ())]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of prompts, turns and responses in order; how the rows lie in batches makes no difference."""
        content = ContentHash()
        for batch in self.table.to_batches(max_chunksize=65_536):
            content.update(batch)
        return content.hexdigest()

    @cached_property
    def boilerplate(self) -> Boilerplate:
        """The wording that many rows share; found when it is first asked for."""
        return Boilerplate.learn(self.table.to_batches(max_chunksize=8192), len(self))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def prompts(self) -> Sequence[str]:
        """The text before each answer: all turns joined by blank lines."""
        return Column(self.table["prompt"])

    def responses(self) -> Sequence[str]:
        return Column(self.table["response"])

    def ids(self) -> Sequence[str]:
        return Column(self.table["id"])

    def skills(self) -> list[str | None]:
        skills: list[str | None] = self.table["skill"].to_pylist()
        return skills

    def row(self, index: int) -> Row:
        return self.rows([index])[0]

    def rows(self, indices: Iterable[int]) -> list[Row]:
        """The rows at these indices, in the order given."""
        return self.of_batch(self.take(list(indices)))

    def __iter__(self) -> Iterator[Row]:
        for batch in self.table.to_batches(max_chunksize=4096):
            yield from self.of_batch(batch)

    @staticmethod
    def of_batch(batch: pa.RecordBatch) -> list[Row]:
        """The rows of one batch of the table."""
        return [_row(value) for value in batch.to_pylist()]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> pa.Table:
        """An Arrow table of these rows, in the order given, with the columns of POOL_SCHEMA."""
        return self.table.take(np.asarray(indices, dtype=np.int64))

    def without(self, indices: Iterable[int]) -> Pool:
        """The pool less these rows, in memory; the same pool where there are none to drop."""
        dropped = np.fromiter(indices, dtype=np.int64)
        if not len(dropped):
            return self
        keep = np.ones(len(self), dtype=bool)
        keep[dropped] = False
        return Pool(self.table.filter(pa.array(keep)))


def pool_from_rows(rows: Sequence[Row]) -> Pool:
    """A pool in memory, for notebooks and tests: nothing is deduplicated or dropped."""
    values = {
        "id": [row.id for row in rows],
        "prompt": [row.prompt for row in rows],
        "response": [row.response for row in rows],
        "messages": [None if _single(row.messages) else turns_json(row.messages) for row in rows],
        "skill": [row.skill for row in rows],
        "row": [encode(dict(row.columns)).decode() for row in rows],
    }
    return Pool(pa.table(values, schema=POOL_SCHEMA))


def turns_json(turns: Iterable[Message]) -> str:
    return orjson.dumps([{"role": turn.role, "content": turn.content} for turn in turns]).decode()


def _single(turns: Sequence[Message]) -> bool:
    return len(turns) == 1 and turns[0].role == "user"


def _row(value: dict[str, Any]) -> Row:
    if value["messages"] is None:
        turns: tuple[Message, ...] = (Message("user", value["prompt"]),)
    else:
        turns = tuple(Message(turn["role"], turn["content"]) for turn in json.loads(value["messages"]))
    return Row(value["id"], turns, value["response"], value["skill"], orjson.loads(value["row"]))


class ContentHash:
    """Hash of the prompt, messages and response columns that does not depend on how the rows are cut into batches.

    Per column one BLAKE2b of the texts laid end to end and one of their lengths (-1 where there is none).
    """

    COLUMNS = ("prompt", "messages", "response")

    def __init__(self) -> None:
        self.digests = {name: (_digest(), _digest()) for name in self.COLUMNS}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, (texts, lengths) in self.digests.items():
            column = batch.column(name)
            missing = column.is_null().to_numpy(zero_copy_only=False)
            _, offsets, data = column.buffers()
            ends = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
            lengths.update(np.where(missing, -1, np.diff(ends)).astype("<i8").tobytes())
            if data is not None:
                texts.update(memoryview(data)[ends[0] : ends[-1]])

    def hexdigest(self) -> str:
        whole = _digest()
        for texts, lengths in self.digests.values():
            whole.update(texts.digest() + lengths.digest())
        return whole.hexdigest()


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=32)


class RowsWriter:
    """Writes `rows/` batch by batch, as `datasets` lays out a saved data set; memory is that of one batch."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.content = ContentHash()
        self.rows = 0
        self.file = pa.OSFile(str(folder / ROWS_FILE), "wb")
        self.stream = pa.ipc.new_stream(self.file, POOL_SCHEMA)

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            with disk_errors(self.folder):
                self.stream.write_batch(batch)
            self.content.update(batch)
            self.rows += batch.num_rows

    def close(self) -> None:
        """Ends the file and writes what `datasets.load_from_disk` needs beside it."""
        with disk_errors(self.folder):
            self.stream.close()
            self.file.close()
        features = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in POOL_SCHEMA}
        write_json(self.folder / "dataset_info.json", {"features": features})
        state: dict[str, Any] = {
            "_data_files": [{"filename": ROWS_FILE}],
            "_fingerprint": self.content.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / "state.json", state)


def is_pool(path: Path) -> bool:
    """Whether the folder says that it is a pool."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return False
    value = read_json(manifest)
    return isinstance(value, dict) and value.get("kind") == "pool"
