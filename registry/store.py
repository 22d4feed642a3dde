"""The registry: a folder in which experts and mixtures have names, immutable versions, and files that prove themselves.

    registry.json       what this folder is
    blobs/              files, or their parts, by sha256     (blobs.py, cutting.py)
    blobs/documents/    a copy of every document, by sha256
    records/            the documents, by name               (documents.py, record_folder.py)
    index.sqlite        made from the records                (index.py)
    drafts/             files under way

Order of writing: blobs, then the record, then its copy, then the index. A process may die between any two steps: a blob
without a record is litter for `gc`, a record without a copy or an index row gets them when the registry is next opened.
Numbers are given out, tags are moved and things are removed inside the index's one writing transaction.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import hashlib
import os
import time
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
from xpert.registry.documents import SCHEMA, DocumentName, Tag, document_bytes
from xpert.registry.index import Index, NoRoom, lock_of
from xpert.registry.intake import GIB, MIXTURE_FILE, MOST_DOCUMENT, WEIGHTS_FILE, Intake, examine, parse_json
from xpert.registry.names import LATEST, Ref, check_name, check_tag, default_registry, parse_ref, registry_folder
from xpert.registry.rebuilding import Rebuilt, lost_documents, restore_names
from xpert.registry.record_folder import RecordFolder
from xpert.registry.searching import Hit, Query, find, open_fixed_embedder, text_of
from xpert.registry.signatures import Signature, SignatureList
from xpert.registry.signing_keys import SigningKey
from xpert.registry.soundness import Problem, problems
from xpert.registry.standing import refusals
from xpert.registry.taxonomy import Taxonomy
from xpert.registry.trust import TrustList
from xpert.registry.versions import MOST_VERSION, Record, StoredFile, Version, content_digest
from xpert.storage import disk_errors, disk_is_full, read_json, write_json

__all__ = ["Details", "Entry", "Garbage", "Hit", "Problem", "Rebuilt", "Registry", "Version", "default_registry"]

MARK = "registry.json"
INDEX = "index.sqlite"
_OWN = ("blobs", f"blobs/{DOCUMENTS}", "records", "drafts", "index.lock", INDEX, f"{INDEX}-wal", f"{INDEX}-shm")
"""What is written and cleaned here; through a link somebody else would choose where."""
MAX_GIB = 4.0
_SETTLED_SECONDS = 2.0
"""A folder changed this lately may change again without its time of change telling: it is looked at once more."""


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


@dataclass(frozen=True)
class Garbage:
    """What `gc` removed, or would remove: blobs no version needs, and drafts of dead processes."""

    files: int
    size: int


class Registry:
    """A registry in a folder. Opens the index anew for every call, so it may be shared by threads and kept for long.

    `location` is a path or a `file://` URL; without one it is `$XPERT_REGISTRY` or the user's data folder, which may
    not exist yet and then reads as empty. `publish` makes the folder.
    """

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

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def publish(
        self,
        source: str | Path,
        name: str,
        *,
        tags: Sequence[str] = (),
        latest: bool = True,
        max_gib: float = MAX_GIB,
        allow_secret_like: bool = False,
        progress: Progress = SILENT,
    ) -> Version:
        """Files an expert folder or a mixture file under `owner/name` as its next version, and moves `tags` to it.

        Content that the name has already is not published again: its version is returned, with `repeated` set.
        Without `latest`, that tag stays where it is. Raises BadInput or Corrupt for anything that may not enter (see
        `intake.py`), and for a mixture whose experts are not all in this registry. Cost: each file is read twice and
        written once.
        """
        check_name(name)
        for tag in tags:
            check_tag(tag)
        intake = examine(Path(source), max_bytes=int(max_gib * GIB), allow_secret_like=allow_secret_like)
        if intake.left_out:
            progress.say(f"left out: {', '.join(intake.left_out)}")
        with disk_errors(self.folder):
            self._make()
            for content, file in intake.files:
                self.blobs.put(content, file)
            version = self._enter(intake, name, tags, stay=not latest, progress=progress)
        if version.repeated:
            progress.say(f"this content is published already, as {version.ref}")
        return version

    def _enter(self, intake: Intake, name: str, tags: Sequence[str], *, stay: bool, progress: Progress) -> Version:
        """Makes what was examined, and whose contents are stored, a version with its tags."""
        with self._opened() as index, index.writing():
            version = self._file(index, intake, name, stay=stay)
            for tag in tags:
                self._move(index, version, tag)
        return version

    def _file(self, index: Index, intake: Intake, name: str, *, stay: bool) -> Version:
        """Inside the writing transaction: gives out the number, writes the record, adds it to the index."""
        self._follow(index, name.partition("/")[0])
        clash = index.clash(name)
        if clash is not None:
            raise BadInput(f"{name} differs from the published {clash} by case only", hint="choose another name")
        digest = content_digest(intake.stored)
        published = index.versions(name)
        for earlier in published:
            if earlier.digest == digest and self.records.record_path(name, earlier.version).is_file():
                self.records.keep_copy(DocumentName(name, "record", earlier.version))
                self._put_again(self.records.read(name, earlier.version), intake)
                return dataclasses.replace(earlier, repeated=True)
        if published and published[-1].kind != intake.kind:
            raise BadInput(
                f"{name} is the name of {_one(published[-1].kind)}, not of {_one(intake.kind)}",
                hint="choose another name",
            )
        skills = intake.skills if intake.kind == "expert" else self._check_uses(index, intake)
        for content, file in intake.files:
            if not self.blobs.holds(file):  # a `gc` ran since it was put there
                self.blobs.put(content, file)
        owner = name.partition("/")[0]
        taken = [number for other, number in index.listing(owner) if other == name]
        number = max([*self.records.numbers(name), *taken], default=0) + 1
        if number > MOST_VERSION:
            raise BadInput(f"{name} has no number left after {MOST_VERSION}", hint="choose another name")
        version = Version(
            name=name,
            version=number,
            kind=intake.kind,
            digest=digest,
            created=_now(),
            size=sum(file.size for file in intake.stored),
            base=intake.base,
            base_fingerprint=intake.base_fingerprint,
            description=intake.description,
            skills=skills,
            scores=intake.scores,
            uses=intake.uses,
        )
        if stay and published:
            self._move(index, published[-1], LATEST, to=index.latest(name), through=version.version)
        record = self._commit(Record(version, intake.stored))
        index.add(record.version)
        return record.version

    def _put_again(self, record: Record, intake: Intake) -> None:
        """Puts right what is missing or damaged of a version whose files were cut otherwise, as schema 1 did."""
        sources = {file.path: (content, file) for content, file in intake.files}
        for file in record.files:
            content, examined = sources[file.path]
            if file.blobs != examined.blobs or not self.blobs.holds(file):
                self.blobs.put(content, file)

    def _commit(self, record: Record) -> Record:
        """Makes a version count. Inside the writing transaction."""
        self.records.add(record)
        return record

    def adopt(
        self, record: Record, folder: Path, *, allow_secret_like: bool = False, progress: Progress = SILENT
    ) -> bool:
        """Files a version of another registry, its files lying in `folder`, under its own number and record.

        False where it is here already. What may enter is examined as by `publish`. Raises BadInput where its number is
        taken by another content or by a removed version, Corrupt where the folder is not what the record says.
        """
        version = record.version
        source = folder if version.kind == "expert" else folder / MIXTURE_FILE
        intake = examine(source, max_bytes=2 * version.size, allow_secret_like=allow_secret_like)
        if content_digest(intake.stored) != version.digest:
            raise Corrupt("holds other files than the record says", where=version.ref)
        with disk_errors(self.folder):
            self._make()
            for file in record.files:
                self.blobs.put(folder / file.path, file)
            with self._opened() as index, index.writing():
                if self._has(index, record):
                    return False
                if version.kind == "mixture":
                    self._check_uses(index, intake)
                for file in record.files:
                    if not self.blobs.holds(file):  # a `gc` ran since it was put there
                        self.blobs.put(folder / file.path, file)
                index.add(self._commit(record).version)
        return True

    def _has(self, index: Index, record: Record) -> bool:
        """Whether the very version is here; raises BadInput where something else bears its name or number."""
        version = record.version
        self._follow(index, version.name.partition("/")[0])
        clash = index.clash(version.name)
        if clash is not None:
            raise BadInput(f"{version.name} differs from {clash} in {self.location} by case only")
        here = self.records.numbers(version.name).get(version.version)
        if here is None:
            published = index.versions(version.name)
            if published and published[-1].kind != version.kind:
                kind = _one(published[-1].kind)
                raise BadInput(f"{version.name} is the name of {kind} in {self.location}, not of {_one(version.kind)}")
            return False
        if here:
            raise BadInput(f"{version.ref} was removed from {self.location}; its number is not given out again")
        if self.records.read(version.name, version.version).version.digest != version.digest:
            raise BadInput(
                f"{version.ref} has another content in {self.location}",
                hint="pull it, and publish it there as the next version",
            )
        return True

    def take_over(self, signatures: SignatureList) -> None:
        """Adds the signatures that a version has in another registry; raises NotFound where the version is not here."""
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, Ref(signatures.name, signatures.version))
            self._sign(version, signatures)

    def fetch(self, record: Record, files: Sequence[StoredFile] | None = None, progress: Progress = SILENT) -> None:
        """Sees to it that files of a version (None: all) are among the blobs. In a folder they always are."""

    def tag(self, ref: str, tag: str) -> Version:
        """Moves a tag to a version and returns that version; raises NotFound where there is none such."""
        check_tag(tag)
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, parse_ref(ref))
            self._move(index, version, tag)
        return version

    def untag(self, name: str, tag: str) -> None:
        """Takes a tag away; `latest` then follows the newest version again. Raises NotFound where there is no tag."""
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, Ref(check_name(name)))
            known = index.tag(name, check_tag(tag))
            if known is None or known.version is None:
                raise NotFound(f"{name} has no tag {tag!r}", hint=_tags_hint(index, name))
            self._move(index, version, tag, to=None)

    def _move(self, index: Index, version: Version, tag: str, *, to: int | None = -1, through: int = 0) -> None:
        """Writes where a tag points: to `version` unless `to` says otherwise (None: nowhere any more)."""
        known = index.tag(version.name, tag)
        target = version.version if to == -1 else to
        newest = max([through, *(v.version for v in index.versions(version.name))])
        if known is not None and (known.version, known.through) == (target, newest):
            return
        revision = known.revision + 1 if known is not None else 1
        moved = Tag(version.name, tag, target, newest, revision, _now())
        self._write(moved.document, document_bytes(moved.to_dict()))
        index.set_tag(moved)

    def sign(self, ref: str, key: SigningKey) -> Version:
        """Adds a signature to a version, and returns that version. Signing again changes nothing.

        Signed is what the record says: whoever vouches for a version has looked at its content before.
        """
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, parse_ref(ref))
            self._sign(version, SignatureList(version.name, version.version, (key.sign(self._read(version)),)))
        return version

    def _sign(self, version: Version, more: SignatureList) -> None:
        known = self.records.read_signatures(version.name, version.version)
        merged = known.merged(more)
        if merged.signatures != known.signatures:
            self._write(DocumentName(version.name, "signatures", version.version), merged.to_bytes())

    def _write(self, document: DocumentName, data: bytes) -> None:
        """Creates or replaces a document that is no record. Inside the writing transaction."""
        self.records.replace(document, data)

    def _withdraw(self, version: Version) -> None:
        """Marks a version as removed. Inside the writing transaction."""
        self.records.remove(version.name, version.version)

    def _check_uses(self, index: Index, intake: Intake) -> tuple[str, ...]:
        """The skills of a mixture's experts; raises where one is not here or is not what the mixture says."""
        skills: dict[str, None] = {}
        for ref, fingerprint in zip(intake.uses, intake.use_fingerprints, strict=True):
            expert = self._resolve(index, parse_ref(ref))
            if expert.kind != "expert":
                raise BadInput(f"the mixture refers to {ref}, which is {_one(expert.kind)}")
            if intake.base_fingerprint and expert.base_fingerprint != intake.base_fingerprint:
                raise BadInput(f"{ref} belongs to another base model than the mixture")
            if fingerprint and fingerprint not in self._fingerprints(expert):
                raise BadInput(
                    f"the mixture means another content of {ref} than this registry holds",
                    hint="assemble the mixture again with `xpert mix`",
                )
            skills |= dict.fromkeys(expert.strengths)
        return tuple(skills)

    def _fingerprints(self, expert: Version) -> set[str]:
        """What a mixture may name an expert's content by: the version's digest, or the sha256 of its weights."""
        files = self.records.read(expert.name, expert.version).files
        return {expert.digest, *(file.sha256 for file in files if file.path == WEIGHTS_FILE)}

    def remove(self, ref: str, *, force: bool = False) -> list[Version]:
        """Removes one version, or all versions of a name where `ref` has none; their numbers stay taken.

        Raises BadInput where a mixture that stays refers to one of them, unless forced. Files go with `gc`.
        """
        wanted = parse_ref(ref)
        every = "@" not in ref
        with disk_errors(self.folder), self._open() as index, index.writing():
            latest = self._resolve(index, wanted)
            gone = index.versions(wanted.name) if every else [latest]
            refs = {version.ref for version in gone}
            users = [m for m in index.all(kind="mixture") if refs & set(m.uses) and m.ref not in refs]
            if users and not force:
                raise BadInput(
                    f"{users[0].ref} refers to {min(refs & set(users[0].uses))}",
                    hint="remove that mixture first, or use --force",
                )
            for version in gone:
                self._withdraw(version)
                index.mark_removed(version.name, version.version)
            for tag in index.tags(wanted.name):
                if tag.version is not None and f"{tag.name}@{tag.version}" in refs:
                    self._move(index, latest, tag.tag, to=None, through=tag.through)
        return gone

    def gc(self, *, dry_run: bool = False) -> Garbage:
        """Removes the blobs that no version needs, documents that are no longer in force, and drafts of processes that
        have ended.

        Raises Corrupt where a record is lost or cannot be read: what it needs would then be unknown.
        """
        with disk_errors(self.folder), self._open() as index, index.writing():
            self._refuse_lost(index)
            needed: set[str] = set()
            in_force: set[str] = set()
            ended: builtins.list[Path] = []
            for document in self.records.documents():
                if document.kind in ("record", "signatures"):
                    assert document.version is not None
                    if self.records.removed(document.name, document.version):
                        ended.append(self.records.path(document))  # its remover died after the mark
                        continue
                if document.kind == "record":
                    assert document.version is not None
                    for file in self.records.read(document.name, document.version).files:
                        needed.update(part.sha256 for part in file.blobs)
                in_force.add(hashlib.sha256(self.records.read_bytes(document)).hexdigest())
            garbage = [path for sha256, path in self.blobs.all() if sha256 and sha256 not in needed]
            garbage += [path for sha256, path in self.records.copies.all() if sha256 and sha256 not in in_force]
            garbage += [*ended, *self.drafts.stale()]
            size = sum(path.lstat().st_size for path in garbage)
            for path in garbage if not dry_run else ():
                path.unlink(missing_ok=True)
        return Garbage(len(garbage), size)

    def _refuse_lost(self, index: Index) -> None:
        on_disk = self.records.listing()
        lost = [key for key, removed in index.listing().items() if not removed and key not in on_disk]
        lost += lost_documents(self.records)
        if lost:
            name, number = lost[0]
            raise Corrupt(
                f"the record of {name}@{number} is missing, so its files are unknown",
                where=self.location,
                hint="bring it back with `xpert registry rebuild`, or `xpert registry remove` that version",
            )

    def rebuild(self, progress: Progress = SILENT) -> Rebuilt:
        """Makes `records/` and the index again from the blobs alone.

        Documents that are there and sound stay, and get the copies they lack; a damaged or missing one is brought back
        from its copy. Cost: reads every document twice, no content.
        """
        if not self.records.copies.folder.is_dir() and not (self.folder / MARK).is_file():
            raise NotFound("there is no registry", where=str(self.folder), hint="`registry publish` makes one")
        self._refuse_links()
        with disk_errors(self.folder):
            if not (self.folder / MARK).is_file():
                write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA})
            Index.discard_damaged(self.folder / INDEX)
            with Index.open(self.folder / INDEX) as index, index.writing():
                rebuilt = restore_names(self.records, progress)
                index.forget_all()
                self._follow(index)
        return rebuilt

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
            return _tags(index, name)

    def record(self, ref: str | Ref) -> Record:
        """The record of a version, which names its files; raises Corrupt where it is damaged."""
        return self._read(self.resolve(ref))

    def show(self, ref: str) -> Details:
        """A version's record and document; raises Corrupt where either is damaged."""
        with self._open() as index:
            version = self._resolve(index, parse_ref(ref))
            numbers = tuple(other.version for other in index.versions(version.name))
            tags = _tags(index, version.name)
        return self._details(version, numbers, tags)

    def survey(self) -> Iterator[tuple[Version, Details | XpertError]]:
        """Every version, by name and number, with what `show` tells of it, or the error that `show` would raise."""
        with self._open() as index:
            every = index.all()
            tags = {version.name: _tags(index, version.name) for version in every}
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
        the hundred whose descriptions are closest to it, where vectors that the index lacks are made first (see
        `searching.py`). `base` is a base model's reference or the beginning of its fingerprint. `min_score` asks for a
        skill with at least that score: one that `text` names or means, or any skill where it names none.
        """
        query = Query(text, base=base, kind=kind, min_score=min_score, limit=limit, taxonomy=taxonomy)
        if embedder is None or not text.strip():
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

    def _make(self) -> None:
        self._refuse_links()
        if (self.folder / MARK).is_file():
            return
        # Another process may be making it, or have made it since; only a folder of other things is refused.
        if self.folder.exists() and not self._only_drafts() and not (self.folder / MARK).is_file():
            raise BadInput("not a registry: it holds other things", where=str(self.folder))
        write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA})

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
        schema = _schema(mark)
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
            changed = self._changed(index)
            if changed:
                with index.writing():
                    for owner in changed:
                        self._follow(index, owner)
            yield index

    def _upgrade(self, index: Index, mark: Path) -> None:
        """Schema 1 had no copies of documents, and a removed version's mark was its old record under another name."""
        with index.writing():
            if _schema(mark) == SCHEMA:
                return
            for document in self.records.documents():
                if document.kind == "removed":
                    assert document.version is not None
                    self.records.remove(document.name, document.version)
                else:
                    self.records.keep_copy(document)
            write_json(mark, {"kind": "registry", "schema": SCHEMA})

    def _changed(self, index: Index) -> builtins.list[str]:
        """The owners among whose documents something came, went or moved since the index looked at them."""
        known = index.owners()
        found = {owner: at for owner, at in self.records.owners().items() if known.get(owner) != at}
        return [owner for owner, at in found.items() if _is_settled(at) or self._differs(index, owner)]

    def _differs(self, index: Index, owner: str) -> bool:
        if self.records.listing(owner) != index.listing(owner):
            return True
        for document in self.records.documents(owner):
            if document.kind == "tag":
                with contextlib.suppress(Corrupt, NotFound):
                    tag = self.records.read_tag(document)
                    if tag != index.tag(tag.name, tag.tag):
                        return True
        return False

    def _follow(self, index: Index, owner: str | None = None) -> None:
        """Brings into the index what the records hold and it does not. Damaged documents are left to `verify`."""
        owners = self.records.owners()
        for one in [owner] if owner is not None else sorted(owners):
            seen = owners.get(one)
            known = index.listing(one)
            for key, removed in self.records.listing(one).items():
                if known.get(key) == removed:
                    continue
                with contextlib.suppress(Corrupt, NotFound):
                    if removed:
                        self._keep_copy(DocumentName(key[0], "removed", key[1]))
                        index.mark_removed(*key)
                    elif key not in known:
                        record = self.records.read(*key)
                        self._keep_copy(record.document)
                        index.add(record.version)
            for document in self.records.documents(one):
                if document.kind == "tag":
                    with contextlib.suppress(Corrupt, NotFound):
                        tag = self.records.read_tag(document)
                        if tag != index.tag(tag.name, tag.tag):
                            self._keep_copy(document)
                            index.set_tag(tag)
            if seen is not None and _is_settled(seen):
                index.looked_at(one, seen)

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
            close = nearest(ref.name, index.names())
            hint = f"did you mean {close!r}?" if close else "`xpert registry list` shows what there is"
            raise NotFound(f"nothing is published as {ref.name!r}", where=self.location, hint=hint)
        wanted = ref.version
        if wanted is None and ref.tag in (None, LATEST):
            wanted = index.latest(ref.name)
        elif wanted is None and ref.tag is not None:
            tag = index.tag(ref.name, ref.tag)
            if tag is None or tag.version is None:
                raise NotFound(f"{ref.name} has no tag {ref.tag!r}", hint=_tags_hint(index, ref.name))
            wanted = tag.version
        for version in versions:
            if version.version == wanted:
                return version
        numbers = ", ".join(str(version.version) for version in versions[-10:])
        raise NotFound(
            f"{ref.name} has no version {wanted}", hint=f"it has {numbers} ({LATEST}: {index.latest(ref.name)})"
        )


def _tags(index: Index, name: str) -> dict[str, int]:
    latest = index.latest(name)
    pointing = {tag.tag: tag.version for tag in index.tags(name) if tag.version is not None}
    return pointing if latest is None else {**pointing, LATEST: latest}


def _tags_hint(index: Index, name: str) -> str:
    return "it has " + ", ".join(f"{tag} ({number})" for tag, number in sorted(_tags(index, name).items()))


def _schema(mark: Path) -> int:
    value = read_json(mark, most=4096)
    if not isinstance(value, dict) or value.get("kind") != "registry" or type(value.get("schema")) is not int:
        raise Corrupt("not the mark of a registry", where=str(mark))
    schema: int = value["schema"]
    if schema > SCHEMA:
        raise BadInput(f"made by a newer xpert (schema {schema})", where=str(mark), hint="upgrade xpert")
    return schema


def _is_settled(changed: int) -> bool:
    return time.time_ns() - changed > _SETTLED_SECONDS * 1e9


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _one(kind: str) -> str:
    return "an expert" if kind == "expert" else f"a {kind}"
