"""Reading sources, streaming: each source gives blocks of rows with their line numbers and their JSON text.

Files (`.jsonl .json .csv .parquet`, those of text also as `.gz` or `.zst`), folders saved by `datasets`, and
`hf:owner/name[:config][:split]`. Memory is that of one block (a few MiB), whatever the size of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from xpert.errors import BadInput, NotFound
from xpert.json_readers import JsonArray, JsonLines
from xpert.source_files import BLOCK_BYTES, Block, no_report
from xpert.table_readers import Csv, Parquet

__all__ = ["BLOCK_BYTES", "EXTENSIONS", "Block", "Source", "open_source"]


class Source(Protocol):
    """Something rows can be read from."""

    name: str
    """How rows and messages name it: the file's name."""
    where: str
    """How errors name it: the path as the user gave it."""
    size: int | None
    """Bytes on disk, for progress."""

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
        """The rows in order. `moved` is told how many bytes of the source were read since the last call."""

    def fingerprint(self) -> str:
        """Hash of the content."""


def open_source(spec: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Source:
    """The source a user named. Raises NotFound or BadInput where there is none that can be read."""
    text = str(spec)
    if text.startswith("hf:"):
        from xpert.hub_reader import HubSource

        return HubSource(text)
    path = Path(spec)
    if path.is_dir():
        return _folder_source(path)
    if not path.exists():
        hint = "to read from the Hugging Face hub write hf:owner/name" if text.count("/") == 1 else None
        raise NotFound("no such file", where=text, hint=hint or "check the path")
    for extension, make in EXTENSIONS.items():
        if path.name.lower().endswith(extension):
            if path.stat().st_size == 0:
                raise BadInput("the file is empty", where=text, hint="it must hold at least one row")
            return make(path, block_bytes)
    raise BadInput(
        f"unknown kind of file {path.suffix or path.name!r}", where=text, hint=f"known: {' '.join(EXTENSIONS)}"
    )


def _folder_source(path: Path) -> Source:
    from xpert.hub_reader import DatasetFolder

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return DatasetFolder(path)
    if (path / "rejected.jsonl").is_file():
        raise BadInput("is a pool already, not a source", where=str(path), hint="name the files it was built from")
    raise BadInput(
        "the folder is neither a pool nor a dataset saved by `datasets`",
        where=str(path),
        hint="name a file in it, or save it with Dataset.save_to_disk",
    )


EXTENSIONS: dict[str, Callable[[Path, int], Source]] = {
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".jsonl.zst": JsonLines,
    ".json": JsonArray,
    ".json.gz": JsonArray,
    ".json.zst": JsonArray,
    ".csv": Csv,
    ".csv.gz": Csv,
    ".csv.zst": Csv,
    ".parquet": Parquet,
}
