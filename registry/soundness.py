"""Reads a whole registry and tells what is unsound in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xpert.errors import NotFound, XpertError
from xpert.progress import Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.card import CARD_FILE
from xpert.registry.card_schema import check_card
from xpert.registry.index import Index
from xpert.registry.intake import read_document
from xpert.registry.versions import Record, RecordFolder

__all__ = ["Problem", "problems"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a version, a blob or a file), and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def problems(folder: Path, blobs: BlobStore, records: RecordFolder, index: Index, progress: Progress) -> list[Problem]:
    """Every unsound record, blob and index row. Cost: reads each file of the registry once.

    Blobs that no version needs are checked like the others; that they are there is no fault (`gc` removes them).
    A version removed while this runs is not reported.
    """
    found, intact = _check_records(records)
    # The records are read before the blobs: what is published meanwhile has its blobs already.
    stored = list(blobs.all())
    state: dict[str, str | None] = {}
    with progress.task("verifying", len(stored)) as task:
        for sha256, path in stored:
            if not sha256:
                found.append(Problem(str(path.relative_to(folder)), "does not belong here"))
            else:
                state[sha256] = blobs.problem(sha256)
            task.advance()
    needed = {file.sha256 for record in intact.values() for file in record.files}
    for key, record in intact.items():
        if records.path(*key).is_file():
            found += _check_version(record, state, blobs)
    found += [
        Problem(f"blob {sha256}", what)
        for sha256, what in state.items()
        if what and sha256 not in needed and blobs.path(sha256).exists()
    ]
    found += [Problem(str(path.relative_to(folder)), "does not belong here") for path in records.strangers()]
    return found + list(_check_index(index, records, intact))


def _check_records(records: RecordFolder) -> tuple[list[Problem], dict[tuple[str, int], Record]]:
    found, intact = [], {}
    for key, removed in sorted(records.listing().items()):
        if removed:
            continue
        try:
            intact[key] = records.read(*key)
        except NotFound:
            continue  # removed since it was listed
        except XpertError as error:
            found.append(Problem("{}@{}".format(*key), error.what))
    return found, intact


def _check_version(record: Record, state: dict[str, str | None], blobs: BlobStore) -> Iterator[Problem]:
    sound = True
    for file in record.files:
        what = state.get(file.sha256) if file.sha256 in state else blobs.problem(file.sha256, file.size)
        if what is None and blobs.path(file.sha256).stat().st_size != file.size:
            what = "another size than recorded"
        if what:
            sound = False
            yield Problem(f"{record.version.ref}: {file.path}", what)
    if sound and record.version.kind == "expert":
        card = next((file.sha256 for file in record.files if file.path == CARD_FILE), None)
        try:
            if card is None:
                raise NotFound("has no card")
            check_card(read_document(blobs.path(card)), record.version.ref)
        except XpertError as error:
            yield Problem(record.version.ref, error.what)


def _check_index(index: Index, records: RecordFolder, intact: dict[tuple[str, int], Record]) -> Iterator[Problem]:
    for line in index.unsound():
        yield Problem("index.sqlite", line)
    indexed = {(version.name, version.version): version for version in index.all()}
    for key, version in indexed.items():
        removed = records.numbers(version.name).get(version.version) if key not in intact else None
        if key in intact and version != intact[key].version:
            yield Problem(version.ref, "the index says something else than the record; remove index.sqlite")
        if key not in intact and removed is None:
            yield Problem(version.ref, "its record is missing")
    for version in indexed.values():
        for ref in version.uses:
            name, _, number = ref.rpartition("@")
            if (name, int(number)) not in indexed and records.path(version.name, version.version).is_file():
                yield Problem(version.ref, f"refers to {ref}, which is not in this registry")
