"""Reading a registry: what is there, what it holds, and getting it out. `store.py` adds the writing."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from xpert.errors import BadInput, Corrupt, NotFound, XpertError, nearest
from xpert.progress import SILENT, Progress
from xpert.registry.blobs import DOCUMENTS, BlobStore, Drafts
from xpert.registry.card import CARD_FILE
from xpert.registry.checkout import check_out, check_out_to_cache
from xpert.registry.documents import SCHEMA, DocumentName
from xpert.registry.following import changed_owners, follow
from xpert.registry.index import Index, NoRoom, lock_of
from xpert.registry.intake import MIXTURE_FILE, MOST_DOCUMENT, parse_json
from xpert.registry.names import LATEST, Ref, check_name, default_registry, parse_ref, registry_folder
from xpert.registry.record_folder import RecordFolder
from xpert.registry.searching import Hit, Query, find, open_fixed_embedder, text_of
from xpert.registry.signing.signatures import Signature
from xpert.registry.signing.standing import refusals
from xpert.registry.signing.trust import TrustList
from xpert.registry.skills.taxonomy import Taxonomy
from xpert.registry.soundness import Problem, problems
from xpert.registry.versions import Record, StoredFile, Version
from xpert.storage import disk_is_full, read_json, write_json

__all__ = ["INDEX", "MARK", "Details", "Entry", "ReadableRegistry", "tags_hint"]

MARK = "registry.json"
INDEX = "index.sqlite"
_OWN = ("blobs", f"blobs/{DOCUMENTS}", "records", "drafts", "index.lock", INDEX, f"{INDEX}-wal", f"{INDEX}-shm")
"""What is written and cleaned here; through a link somebody else would choose where."""


@dataclass(frozen=True)
class Entry:
    """One name: the version that `latest` means, the numbers of all, and where its tags point."""

    latest: Version
    versions: tuple[int, ...]
    tags: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Details:
    """A version with its files and its document: the card of an expert, the JSON of a mixture."""

    version: Version
    files: tuple[StoredFile, ...]
    document: dict[str, Any]
    versions: tuple[int, ...]
    tags: Mapping[str, int] = field(default_factory=dict)


class ReadableRegistry:
    """What can be asked of a registry. Opens the index anew for every call."""

    def __init__(self, location: str | Path | None = None) -> None:
        self._may_be_absent = location is None
        self.folder = default_registry() if location is None else registry_folder(location)
        drafts = Drafts(self.folder / "drafts")
        self.drafts = drafts
        self.blobs = BlobStore(self.folder / "blobs", drafts)
        self.records = RecordFolder(self.folder / "records", drafts, BlobStore(self.blobs.folder / DOCUMENTS, drafts))

    @property
    def location(self) -> str:
        """What opens this registry again, as shown to users and written into mixtures."""
        return str(self.folder.resolve())

    @property
    def notice(self) -> str | None:
        """What a user should know before reading its answers."""
        return None

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, ref: str | Ref) -> Version:
        """The version that `owner/name[@3|@latest]` means; raises NotFound with the nearest name."""
        with self._open() as index:
            return self._resolve(index, parse_ref(ref) if isinstance(ref, str) else ref)

    def list(self) -> Sequence[Entry]:
        """All names, sorted."""
        with self._open() as index:
            tags: dict[str, dict[str, int]] = {}
            for tag in index.tags():
                if tag.version is not None:
                    tags.setdefault(tag.name, {})[tag.tag] = tag.version
            return [
                Entry(latest, numbers, {**tags.get(latest.name, {}), LATEST: latest.version})
                for latest, numbers in index.entries()
            ]

    def numbers(self, name: str) -> Sequence[int]:
        """The numbers of all versions of a name; raises NotFound for one that is not published."""
        with self._open() as index:
            self._resolve(index, Ref(check_name(name)))
            return [version.version for version in index.versions(name)]

    def tags(self, name: str) -> Mapping[str, int]:
        """Tag -> version number; `latest` is always among them. Raises NotFound for a name that is not published."""
        with self._open() as index:
            self._resolve(index, Ref(check_name(name)))
            return tags_of(index, name)

    def record(self, ref: str | Ref) -> Record:
        """The record of a version, which names its files; raises Corrupt where it is damaged."""
        return self._read(self.resolve(ref))

    def show(self, ref: str) -> Details:
        """A version's record and document; raises Corrupt where either is damaged."""
        with self._open() as index:
            version = self._resolve(index, parse_ref(ref))
            numbers = tuple(other.version for other in index.versions(version.name))
            tags = tags_of(index, version.name)
        return self._details(version, numbers, tags)

    def survey(self) -> Iterator[tuple[Version, Details | XpertError]]:
        """Every version, by name and number, with what `show` tells of it, or the error that `show` would raise."""
        with self._open() as index:
            every = index.all()
            tags = {name: tags_of(index, name) for name in {version.name for version in every}}
        numbers: dict[str, builtins.list[int]] = {}
        for version in every:
            numbers.setdefault(version.name, []).append(version.version)
        for version in every:
            try:
                yield version, self._details(version, tuple(numbers[version.name]), tags[version.name])
            except XpertError as error:
                yield version, error

    def _details(self, version: Version, numbers: tuple[int, ...], tags: Mapping[str, int]) -> Details:
        record = self._read(version)
        name = CARD_FILE if version.kind == "expert" else MIXTURE_FILE
        file = next(file for file in record.files if file.path == name)
        where = f"{version.ref}: {name}"
        document = parse_json(self.blobs.read(file, most=MOST_DOCUMENT, what=where), where=where)
        return Details(version, record.files, document, numbers, tags)

    @final
    def pull(
        self,
        ref: str | Ref,
        out: Path | None = None,
        *,
        require_signature: bool = False,
        progress: Progress = SILENT,
    ) -> Path:
        """Copies a version out, every file checked against its sha256, and returns the folder.

        Without `out` the folder lies in the cache under the content's digest; a sound one there is used again. Raises
        Corrupt where a file is missing or damaged or a signature does not match, BadInput where `out` exists or the
        trust list refuses the version; with `require_signature` it refuses whatever no trusted key signed.
        """
        record = self.record(ref)
        TrustList.read().enforce(record, self.signatures_of(record), required=require_signature)
        return self._take_out(record, out, progress)

    def _take_out(self, record: Record, out: Path | None, progress: Progress) -> Path:
        """What is left of `pull` once the version is let through."""
        if out is None:
            return check_out_to_cache(self.blobs, record, progress)
        return check_out(self.blobs, record, Path(out))

    def signatures_of(self, record: Record) -> Sequence[Signature]:
        """Who signed a version; whether they match, and whom to trust, is for `TrustList.judge` to say."""
        return self.records.read_signatures(record.version.name, record.version.version).signatures

    def refused(self) -> Sequence[Problem]:
        """The versions that `pull` would refuse for their signatures, or for lack of them, and why."""
        with self._open():
            return refusals(self.records, TrustList.read())

    def search(
        self,
        text: str = "",
        *,
        base: str | None = None,
        kind: str | None = None,
        min_score: float | None = None,
        taxonomy: Taxonomy | None = None,
        embedder: str | None = None,
        limit: int | None = None,
        device: str = "auto",
        progress: Progress = SILENT,
    ) -> Sequence[Hit]:
        """The latest versions whose name, description or skills hold all words of `text` (their beginnings suffice).

        With a `taxonomy` also those with a skill that `text` means in it; with an `embedder` (`minilm`, `st:NAME`) also
        the hundred whose descriptions are closest to it among those that meet the conditions; vectors that the index
        lacks are made first (see `searching.py`). `base` is a base model's reference or the beginning of its
        fingerprint. `min_score` asks for a skill with at least that score: one that `text` names or means, or any skill
        where it names none. Raises BadInput for an embedder without a text.
        """
        query = Query(text, base=base, kind=kind, min_score=min_score, limit=limit, taxonomy=taxonomy)
        if min_score is not None and min_score != min_score:
            raise BadInput("min-score is not a number", hint="write one from 0 to 1")
        if embedder is not None and not text.strip():
            raise BadInput("nothing is asked that an embedder could compare", hint="give words, or leave it out")
        if embedder is None:
            with self._open() as index:
                return find(index, query, None)
        opened = open_fixed_embedder(embedder, device=device)
        with self._open() as index:
            missing = index.without_vector(opened.identity)
            if missing:
                vectors = opened.embed([text_of(version) for version in missing], progress)
                with index.writing():
                    index.keep_vectors(opened.identity, missing, vectors)
            return find(index, query, opened.embed([text])[0], opened.identity)

    def verify(self, progress: Progress = SILENT) -> Sequence[Problem]:
        """Reads every file of the registry and tells what is unsound; an empty answer means that all is well."""
        with self._open() as index:
            return problems(self.folder, self.blobs, self.records, index, progress)

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _refuse_links(self) -> None:
        for name in _OWN:
            if (self.folder / name).is_symlink():
                raise BadInput(
                    "a symbolic link",
                    where=str(self.folder / name),
                    hint="put what it leads to there; the registry's folder itself may be reached by a link",
                )

    def _only_drafts(self) -> bool:
        return self.folder.is_dir() and all(path.name.startswith(f".{MARK}.draft-") for path in self.folder.iterdir())

    def _opened(self) -> AbstractContextManager[Index]:
        """The index after `_make`, which has brought everything up to date."""
        return self._open()

    @contextmanager
    def _open(self) -> Iterator[Index]:
        """The index, brought up to date with the records."""
        mark = self.folder / MARK
        if not mark.is_file():
            if self.folder.exists() and not self._only_drafts():
                raise BadInput("not a registry folder", where=str(self.folder))
            if not self._may_be_absent:
                raise NotFound("there is no registry", where=str(self.folder), hint="`registry publish` makes one")
            with Index.open(None) as index:
                yield index
            return
        schema = schema_of(mark)
        self._refuse_links()
        # A registry that may only be read, as on a shared disk, gets an index in memory.
        writable = os.access(self.folder, os.W_OK)
        with ExitStack() as held:
            try:
                index = held.enter_context(self._followed(self.folder / INDEX if writable else None, schema))
            except NoRoom:
                # One on a full disk too: it can then be read, and `gc` can make room.
                index = held.enter_context(self._followed(None, schema))
            yield index

    @contextmanager
    def _followed(self, path: Path | None, schema: int) -> Iterator[Index]:
        with Index.open(path, lock=lock_of(self.folder / INDEX) if os.access(self.folder, os.W_OK) else None) as index:
            if schema < SCHEMA and path is not None:
                self._upgrade(index, self.folder / MARK)
            changed = changed_owners(index, self.records)
            if changed:
                with index.writing():
                    for owner in changed:
                        self._follow(index, owner)
            yield index

    def _upgrade(self, index: Index, mark: Path) -> None:
        """Schema 1 had no copies of documents, and a removed version's mark was its old record under another name."""
        with index.writing():
            if schema_of(mark) == SCHEMA:
                return
            for document in self.records.documents():
                if document.kind == "removed":
                    assert document.version is not None
                    self.records.remove(document.name, document.version)
                else:
                    self.records.keep_copy(document)
            write_json(mark, {"kind": "registry", "schema": SCHEMA})

    def _follow(self, index: Index, owner: str | None = None) -> None:
        follow(index, self.records, owner, keep_copy=self._keep_copy)

    def _keep_copy(self, document: DocumentName) -> None:
        if os.access(self.folder, os.W_OK):
            try:
                self.records.keep_copy(document)
            except OSError as error:
                if not disk_is_full(error):  # it gets its copy when there is room
                    raise

    def _read(self, version: Version) -> Record:
        """The record, which is the truth; the index only says that there is one."""
        try:
            record = self.records.read(version.name, version.version)
        except NotFound:
            raise Corrupt("its record is missing", where=version.ref, hint="see `xpert registry verify`") from None
        if record.version.digest != version.digest:
            raise Corrupt(
                "its record is not the one that was indexed: somebody wrote another in its place",
                where=version.ref,
                hint="ask who keeps the registry; `xpert registry rebuild` takes what is there now",
            )
        return record

    def _resolve(self, index: Index, ref: Ref) -> Version:
        versions = index.versions(ref.name)
        if not versions:
            close = _nearest_name(ref.name, index.names())
            hint = f"did you mean {close!r}?" if close else "`xpert registry list` shows what there is"
            raise NotFound(f"nothing is published as {ref.name!r}", where=self.location, hint=hint)
        wanted = ref.version
        if wanted is None and ref.tag in (None, LATEST):
            wanted = index.latest(ref.name)
        elif wanted is None and ref.tag is not None:
            tag = index.tag(ref.name, ref.tag)
            if tag is None or tag.version is None:
                raise NotFound(f"{ref.name} has no tag {ref.tag!r}", hint=tags_hint(index, ref.name))
            wanted = tag.version
        for version in versions:
            if version.version == wanted:
                return version
        numbers = ", ".join(str(version.version) for version in versions[-10:])
        raise NotFound(
            f"{ref.name} has no version {wanted}", hint=f"it has {numbers} ({LATEST}: {index.latest(ref.name)})"
        )


def _nearest_name(name: str, known: Sequence[str]) -> str | None:
    """Of a name whose owner is known the nearest of that owner: the owner's letters are no likeness."""
    owner, _, last = name.partition("/")
    own = [other.partition("/")[2] for other in known if other.startswith(f"{owner}/")]
    close = nearest(last, own) if own else None
    return f"{owner}/{close}" if close else None if own else nearest(name, known)


def tags_of(index: Index, name: str) -> dict[str, int]:
    latest = index.latest(name)
    pointing = {tag.tag: tag.version for tag in index.tags(name) if tag.version is not None}
    return pointing if latest is None else {**pointing, LATEST: latest}


def tags_hint(index: Index, name: str) -> str:
    return "it has " + ", ".join(f"{tag} ({number})" for tag, number in sorted(tags_of(index, name).items()))


def schema_of(mark: Path) -> int:
    value = read_json(mark, most=4096)
    if not isinstance(value, dict) or value.get("kind") != "registry" or type(value.get("schema")) is not int:
        raise Corrupt("not the mark of a registry", where=str(mark))
    schema: int = value["schema"]
    if schema > SCHEMA:
        raise BadInput(f"made by a newer xpert (schema {schema})", where=str(mark), hint="upgrade xpert")
    return schema
