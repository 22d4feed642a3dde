"""The seam of remote registries: a place that keeps documents and contents, of which one member is one file.

Documents are named as in `records/` (`OWNER/NAME@3.json`, `...@2.removed.json`, `...@stable.tag.json`,
`...@3.signatures.json`; see `versions.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from xpert.progress import SILENT, Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.soundness import Problem
from xpert.registry.versions import Record, StoredFile

__all__ = ["Remote"]


class Remote(Protocol):
    """Where versions lie besides local folders. Knows nothing of indexes, numbers or trust: `mirror.py` does.

    Methods raise Unavailable where the place cannot be reached or something to reach it is not installed, BadInput
    where it refuses (no permission, no such bucket), Corrupt where it holds something else than it says. Credentials
    come from the place's own environment and files, and appear in no message, document or `location`.
    """

    schemes: ClassVar[tuple[str, ...]]
    """The URL schemes it answers to, such as ("hf",)."""

    location: str
    """The URL, in normal form and without credentials: names the mirror, and is shown to users."""

    def __init__(self, url: str) -> None:
        """Checks the address; reaches for nothing yet."""

    def listing(self) -> Mapping[str, str]:
        """Name of every document -> a mark that changes when its content does.

        Raises NotFound ("there is no registry") where nothing was ever published, unless that is an empty answer there.
        """

    def read(self, document: str) -> bytes:
        """A document's content, its size bounded before it is read. Raises NotFound where there is none."""

    def push(self, record: Record, data: bytes, blobs: BlobStore, progress: Progress = SILENT) -> None:
        """Puts a new version there: the contents that the place lacks, in parallel, then `data`, the record's document.

        Interrupted, it goes on where it was. Raises FileExistsError where the record's number is taken.
        """

    def fetch(self, record: Record, files: Sequence[StoredFile], blobs: BlobStore, progress: Progress = SILENT) -> None:
        """Brings the blobs of `files` that `blobs` lacks, in parallel and each checked; goes on where it was."""

    def write(self, document: str, data: bytes, *, mark: str | None) -> None:
        """Creates (mark None) or replaces (the mark that `listing` gave) a document that is no record.

        Raises FileExistsError where another writer was there first. A mark of removal also ends the record.
        """

    def sweep(self, needed: Collection[str], *, dry_run: bool = False) -> tuple[int, int]:
        """Removes contents whose sha256 is not `needed`, except very new ones; (files, bytes)."""

    def problems(self, records: Iterable[Record], progress: Progress = SILENT) -> Iterator[Problem]:
        """Reads everything there and tells what is missing or damaged."""
