"""Reads a whole registry and tells what is unsound in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xpert.errors import NotFound, XpertError
from xpert.progress import Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.card import CARD_FILE
from xpert.registry.card_schema import check_card
from xpert.registry.documents import DocumentName
from xpert.registry.index import Index
from xpert.registry.intake import MOST_DOCUMENT, parse_json
from xpert.registry.record_folder import RecordFolder
from xpert.registry.signing.signatures import fingerprint, verify
from xpert.registry.versions import Record

__all__ = ["Problem", "check_documents", "check_index", "problems"]


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
    needed = {part.sha256 for record in intact.values() for file in record.files for part in file.blobs}
    for key, record in intact.items():
        if records.record_path(*key).is_file():
            found += _check_version(record, state, blobs)
    found += [
        Problem(f"blob {sha256}", what)
        for sha256, what in state.items()
        if what and sha256 not in needed and blobs.path(sha256).exists()
    ]
    found += [Problem(str(path.relative_to(folder)), "does not belong here") for path in records.strangers()]
    in_force: dict[str, str] = {}
    found += check_documents(records, intact, in_force)
    found += _check_copies(records, in_force)
    return found + list(check_index(index, records, intact))


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


def check_documents(
    records: RecordFolder, intact: Mapping[tuple[str, int], Record], in_force: dict[str, str] | None = None
) -> Iterator[Problem]:
    """Tags must point at versions, and signatures must match. `in_force` is filled: sha256 -> document."""
    for document in records.documents():
        if (
            document.version is not None
            and document.kind != "removed"
            and records.removed(document.name, document.version)
        ):
            continue  # a remover died between its mark and the record's end; the mark counts
        try:
            if in_force is not None:
                in_force[hashlib.sha256(records.read_bytes(document)).hexdigest()] = str(document)
            if document.kind == "tag":
                tag = records.read_tag(document)
                if tag.version is not None and (tag.name, tag.version) not in intact:
                    if not records.removed(tag.name, tag.version):
                        yield Problem(str(document), f"points to version {tag.version}, which is not there")
            elif document.kind == "signatures":
                yield from _check_signatures(document, records, intact)
        except NotFound:
            continue  # removed since it was listed
        except XpertError as error:
            yield Problem(str(document), error.what)


def _check_copies(records: RecordFolder, in_force: Mapping[str, str]) -> Iterator[Problem]:
    """Every document needs a sound copy to be brought back from."""
    for sha256, document_name in in_force.items():
        what = records.copies.problem(sha256)
        if what and (records.folder / document_name).is_file():
            yield Problem(document_name, f"its copy among the blobs is {what}; `xpert registry rebuild` mends it")
    for sha256, path in records.copies.all():
        place = f"blobs/documents/{path.parent.name}/{path.name}"
        if not sha256:
            yield Problem(place, "does not belong here")
        elif sha256 not in in_force and records.copies.problem(sha256) and path.exists():
            yield Problem(place, "damaged: its content does not match its sha256")


def _check_signatures(
    document: DocumentName, records: RecordFolder, intact: Mapping[tuple[str, int], Record]
) -> Iterator[Problem]:
    assert document.version is not None
    record = intact.get((document.name, document.version))
    for made in records.read_signatures(document.name, document.version).signatures:
        if record is not None and not verify(made, record):
            yield Problem(str(document), f"the signature by {fingerprint(made.key)} does not match the version")


def _check_version(record: Record, state: dict[str, str | None], blobs: BlobStore) -> Iterator[Problem]:
    sound = True
    for file in record.files:
        for part in file.blobs:
            what = state[part.sha256] if part.sha256 in state else blobs.problem(part.sha256, part.size)
            if what is None and blobs.path(part.sha256).stat().st_size != part.size:
                what = "another size than recorded"
            if what:
                sound = False
                yield Problem(f"{record.version.ref}: {file.path}", what)
                break
    if sound and record.version.kind == "expert":
        card = next((file for file in record.files if file.path == CARD_FILE), None)
        where = f"{record.version.ref}: {CARD_FILE}"
        try:
            if card is None:
                raise NotFound("has no card")
            check_card(parse_json(blobs.read(card, most=MOST_DOCUMENT, what=where), where=where), where)
        except XpertError as error:
            yield Problem(record.version.ref, error.what)


def check_index(index: Index, records: RecordFolder, intact: Mapping[tuple[str, int], Record]) -> Iterator[Problem]:
    """Index rows that say something else than the records, and mixtures whose experts are not there."""
    for line in index.unsound():
        yield Problem("index.sqlite", line)
    indexed = {(version.name, version.version): version for version in index.all()}
    for key, version in indexed.items():
        removed = records.numbers(version.name).get(version.version) if key not in intact else None
        if key in intact and version != intact[key].version:
            yield Problem(version.ref, "the index says something else than the record; run `xpert registry rebuild`")
        if key not in intact and removed is None:
            yield Problem(version.ref, "its record is missing")
    for version in indexed.values():
        for ref in version.uses:
            name, _, number = ref.rpartition("@")
            if (name, int(number)) not in indexed and records.record_path(version.name, version.version).is_file():
                yield Problem(version.ref, f"refers to {ref}, which is not in this registry")
